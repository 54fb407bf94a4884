"""The command `plan`."""

from pathlib import Path

import pytest

from cli.helpers import assert_refused


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["plan"], ["type `python -m pipeline plan NAME`"]),
        (["plan", "attention", "--workers", "many"], ["`--workers many`:"]),
        (
            ["plan", "cct", "--set", "optimizer.sgd_momentum=0.5"],
            ["no such field where optimizer.name is adamw or sgd; muon can have it"],
        ),
    ],
)
def test_bad_input_is_refused(words: list[str], lines: list[str], tmp_path: Path) -> None:
    assert_refused(words, lines, tmp_path)
