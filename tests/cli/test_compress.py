"""The command `compress`."""

import re
from pathlib import Path

import pytest
from conftest import Trained
from fork_server import ForkServer

from cli.helpers import assert_refused, write_digits


def test_compress_prints_one_table_and_predict_takes_the_run(
    trained: Trained, fork_server: ForkServer, tmp_path: Path
) -> None:
    home = tmp_path / "mlruns"
    trained.copy(home)
    words = ["compress", trained.finished, "--sparsity", "0.05", "--epochs", "1", "--device", "cpu"]
    done = fork_server.run(words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "model.widths (4, 8) -> (4, 7), optimizer.lr 0.1 -> 0.03, training.epochs 2 -> 1" in done.stdout
    for row in ("original", "original, 8 bits", "pruned", "pruned, 8 bits"):
        assert re.search(
            rf"^ *{row} +\d+\.\d\d% +[\d,]+ +\d+\.\d+ +\d+\.\d+ +\d+\.\d\d *$", done.stdout, re.MULTILINE
        ), row
    [folder] = (home / "exports").iterdir()
    assert {"model.onnx", "model.int8.onnx", "card.md", "MLmodel"} <= {file.name for file in folder.iterdir()}
    (digit,) = write_digits(tmp_path, 1)
    again = fork_server.run(["predict", str(digit), "--model", folder.name], tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith(f"model: trial 0 (sparsity 0.05) of tiny-v1-digits, run {folder.name}\n{digit}: ")


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["compress"], ["RUN: needs a value: a finished run's id, or models:/NAME@ALIAS; type `python -m pipeline"]),
        (["compress", "0" * 32], ["no runs yet in mlruns"]),
        (["compress", "0" * 32, "--sparsity", "1"], ["`--sparsity`: should be less than or equal to 0.99"]),
    ],
)
def test_bad_input_is_refused(words: list[str], lines: list[str], tmp_path: Path) -> None:
    assert_refused(words, lines, tmp_path)
