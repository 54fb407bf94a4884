"""The command `rollback`."""

from pathlib import Path

import pytest

from cli.helpers import assert_refused


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["rollback"], ["`--reason TEXT`: needs to say why"]),
        (["rollback", "--model", "x"], ["rollback --reason 'slower in production than here' --model x`"]),
        (
            ["rollback", "--reason", "x", "--version", "0"],
            ["`--version 0`: should be a number; `python -m pipeline history` shows"],
        ),
        (["rollback", "--reason", "x"], ["no runs yet in mlruns"]),
    ],
)
def test_bad_input_is_refused(words: list[str], lines: list[str], tmp_path: Path) -> None:
    assert_refused(words, lines, tmp_path)
