"""The section `transfer`."""

import pytest
from recipe_cases import lines_of


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"transfer.layer_decay": 0}, "transfer.layer_decay = 0: should be greater than 0"),
        ({"transfer.frozen_share": 1.5}, "transfer.frozen_share = 1.5: should be less than or equal to 1"),
    ],
)
def test_each_problem_is_one_line(changes: dict, line: str) -> None:
    assert lines_of(changes) == [line]
