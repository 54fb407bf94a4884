"""A small recipe, and what is said about changes to it."""

import pytest

from pipeline.errors import UserError
from pipeline.recipe import parse_recipe

SMALL = {
    "model": {"network": "attention"},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "training": {"epochs": 3},
}
RECIPE = parse_recipe(SMALL)


def lines_of(changes: dict) -> list[str]:
    with pytest.raises(UserError) as caught:
        RECIPE.changed(changes)
    return caught.value.lines
