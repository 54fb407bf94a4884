"""The section `curriculum`."""

from recipe_cases import RECIPE, lines_of


def test_growing_images_are_another_recipe_and_take_some_epochs() -> None:
    assert RECIPE.digest() != RECIPE.changed({"curriculum.start_size": 16}).digest()
    assert lines_of({"curriculum.until": 0})[0].startswith("curriculum.until = 0")
