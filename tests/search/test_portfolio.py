"""The recipes that new studies start with."""

import pytest
from conftest import SHIPPED_STUDIES

from pipeline.search.portfolio import PORTFOLIO, fields_for
from pipeline.search.study import load_study


@pytest.mark.parametrize("name", PORTFOLIO)
def test_a_recipe_of_the_portfolio_is_one_for_every_study(name: str) -> None:
    for study in SHIPPED_STUDIES:
        base = load_study(study).base
        changes = fields_for(base, PORTFOLIO[name])
        assert PORTFOLIO[name].keys() - changes.keys() <= {"model.dropout"}
        recipe = base.changed(changes)
        assert {field: recipe.flat()[field] for field in changes} == changes
