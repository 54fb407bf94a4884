"""What holds for every section."""

import pytest
from pydantic import ValidationError
from recipe_cases import RECIPE, lines_of


def test_recipe_is_immutable() -> None:
    with pytest.raises(ValidationError):
        RECIPE.training.epochs = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"optimizer.lr": float("nan")}, "optimizer.lr = nan: should be a finite number"),
        ({"optimizer.lr": float("inf")}, "optimizer.lr = inf: should be a finite number"),
    ],
)
def test_numbers_are_finite(changes: dict, line: str) -> None:
    assert lines_of(changes) == [line]
