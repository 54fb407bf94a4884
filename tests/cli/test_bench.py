"""The command `bench`."""

from pathlib import Path

import pytest

from cli.helpers import assert_refused


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (
            ["bench", "--model", "improvd"],
            ["`--model improvd`: no such network (did you mean improved?)", "there are all, attention, "],
        ),
        (["bench", "--against", "peer.py"], ["`--against`: compares one network; name it by `--model`"]),
        (
            ["bench", "--against", "peer.py", "--model", "plain", "--dataset", "digits"],
            ["`--dataset digits`: peers train on CIFAR-10; leave it out"],
        ),
        (["bench", "--against", "peer.py", "--model", "plain"], ["peer.py", "no such file"]),
        (["bench", "--device", "gpu"], ["`--device gpu`: should be auto"]),
    ],
)
def test_bad_input_is_refused(words: list[str], lines: list[str], tmp_path: Path) -> None:
    assert_refused(words, lines, tmp_path)
