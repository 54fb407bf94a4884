"""The command `ui`."""

from pathlib import Path

import pytest

from cli.helpers import assert_refused


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["ui"], ["no runs yet in mlruns"]),
        (["ui", "--port", "99999"], ["`--port 99999`: "]),
    ],
)
def test_bad_input_is_refused(words: list[str], lines: list[str], tmp_path: Path) -> None:
    assert_refused(words, lines, tmp_path)
