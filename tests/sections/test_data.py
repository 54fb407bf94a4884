"""The section `data`."""

import pytest
from recipe_cases import RECIPE, lines_of

from pipeline.sections.data import Form


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"data.folds": 5, "data.fold": 5},
            "data: fold 5 of folds 5: folds is 0 or at least 2, and fold below it",
        ),
        ({"data.folds": 1}, "data: fold 0 of folds 1: folds is 0 or at least 2, and fold below it"),
        (
            {"data.columns": "label=path"},
            "data.columns = label=path: should name 4 different columns, for path, label, split, group",
        ),
        (
            {"data.columns": "class=species"},
            "data.columns = class=species: should be path=..., label=..., split=..., group=..., those that differ",
        ),
    ],
)
def test_each_problem_is_one_line(changes: dict, line: str) -> None:
    assert lines_of(changes) == [line]


@pytest.mark.parametrize("columns", ["label=species,group=patient", "path,species,split,patient"])
def test_columns_are_named_in_part_or_in_order(columns: str) -> None:
    data = RECIPE.changed({"data.columns": columns}).data
    assert data.column_names == {"path": "path", "label": "species", "split": "split", "group": "patient"}


def test_trials_that_differ_in_crop_scale_share_what_is_decoded() -> None:
    data = RECIPE.changed({"data.geometry": "random_resized_crop"}).data
    forms = {data.model_copy(update={"crop_scale": scale}).form for scale in (0.1, 0.35, 0.8, 1)}
    assert forms == {Form(32, "crop", 64)}
