"""The section `curriculum`."""

from recipe_cases import RECIPE, lines_of


def test_defaults_change_no_digest() -> None:
    assert RECIPE.digest() != RECIPE.changed({"curriculum.start_size": 16}).digest()
    assert lines_of({"curriculum.until": 0})[0].startswith("curriculum.until = 0")
