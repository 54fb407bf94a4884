"""The section `optimizer`."""

import pytest
from recipe_cases import lines_of


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"optimizer.momentum": 0, "optimizer.nesterov": True}, "optimizer: nesterov needs a momentum above 0"),
        ({"optimizer.name": "sgdd"}, "optimizer.name = sgdd: not one of sgd, adam, adamw, muon (did you mean sgd?)"),
        ({"optimizer.beta1": 0.9}, "optimizer.beta1: no such field; optimizer.name adam or adamw has it"),
    ],
)
def test_each_problem_is_one_line(changes: dict, line: str) -> None:
    assert lines_of(changes) == [line]
