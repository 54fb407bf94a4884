"""The command `audit`."""

from pathlib import Path

import pytest

from cli.helpers import assert_refused


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["audit"], ["no runs yet in mlruns"]),
        (["audit", "--tracking-uri", "sqlite:///typo.db"], ["no runs yet in sqlite:///typo.db"]),
        (["audit", "--storage", "sqlite://"], ["`--storage sqlite://`: keeps nothing"]),
    ],
)
def test_bad_input_is_refused(words: list[str], lines: list[str], tmp_path: Path) -> None:
    assert_refused(words, lines, tmp_path)
