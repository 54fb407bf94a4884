"""The section `model`."""

from typing import get_args

import pytest
from recipe_cases import lines_of

from pipeline.sections.model import TRAINING_ONLY, Model


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"model.network": "efficient", "model.widths": (24, 48, 96)},
            "model: widths.0 = 24: must be a multiple of 16 where dilation is above 1: else torch's bf16 gradients of "
            "dilated convolutions are not numbers on a CPU (seen in 2.15)",
        ),
        (
            {"model.network": "timm", "model.backbone": "a/b"},
            r"model.backbone = a/b: String should match pattern '^\w+(\.\w+)?$'",
        ),
        ({"model.widths": ()}, "model.widths = (): Tuple should have at least 1 item after validation, not 0"),
    ],
)
def test_each_problem_is_one_line(changes: dict, line: str) -> None:
    assert lines_of(changes) == [line]


def test_what_changes_the_training_only_is_every_share_or_probability() -> None:
    networks = get_args(get_args(Model)[0])
    assert {
        name for network in networks for name, field in network.model_fields.items() if field.annotation is float
    } == {*TRAINING_ONLY}
