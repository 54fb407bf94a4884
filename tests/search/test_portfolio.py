"""The recipes that new studies start with."""

import pytest

from pipeline.search.portfolio import PORTFOLIO
from pipeline.search.study import available, load_study


@pytest.mark.parametrize("name", PORTFOLIO)
def test_a_recipe_of_the_portfolio_is_one_for_every_study(name: str) -> None:
    for study in available():
        recipe = load_study(study).base.changed(PORTFOLIO[name])
        assert {field: recipe.flat()[field] for field in PORTFOLIO[name]} == dict(PORTFOLIO[name])
