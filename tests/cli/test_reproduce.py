"""The command `reproduce`."""

from pathlib import Path

import pytest

from cli.helpers import assert_refused


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["reproduce"], ["RUN: needs a value: a run's id; type `python -m pipeline reproduce RUN`"]),
        (["reproduce", "0" * 32], ["no runs yet in mlruns"]),
    ],
)
def test_bad_input_is_refused(words: list[str], lines: list[str], tmp_path: Path) -> None:
    assert_refused(words, lines, tmp_path)
