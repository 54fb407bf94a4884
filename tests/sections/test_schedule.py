"""The section `schedule`."""

import pytest
from recipe_cases import lines_of


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"schedule.final_fraction": 2}, "schedule.final_fraction = 2: should be less than or equal to 1"),
        ({"schedule.name": "step", "schedule.interval": 0}, "schedule.interval = 0: should be greater than 0"),
    ],
)
def test_each_problem_is_one_line(changes: dict, line: str) -> None:
    assert lines_of(changes) == [line]
