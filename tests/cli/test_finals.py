"""The command `finals`."""

from pathlib import Path

import pytest

from cli.helpers import assert_refused


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["finals"], ["type `python -m pipeline finals NAME`"]),
        (["finals", "attention", "--seeds", "3", "--folds", "5"], ["`--seeds` and `--folds`: each fold has a seed"]),
        (["finals", "attention", "--workers", "0"], ["`--workers 0`: should be greater than or equal to 1"]),
        (["finals", "attention"], ["no runs yet in mlruns"]),
        (["finals", "attention", "--device", "gpu"], ["`--device gpu`: should be auto, cpu, cuda or cuda:N"]),
    ],
)
def test_bad_input_is_refused(words: list[str], lines: list[str], tmp_path: Path) -> None:
    assert_refused(words, lines, tmp_path)
