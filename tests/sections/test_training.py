"""The section `training`."""

import pytest
from recipe_cases import lines_of


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"training.batch_size": 1}, "training.batch_size = 1: should be greater than or equal to 2"),
        ({"training.precision": "fp16"}, "training.precision = fp16: should be 'auto', 'bf16' or 'fp32'"),
    ],
)
def test_each_problem_is_one_line(changes: dict, line: str) -> None:
    assert lines_of(changes) == [line]
