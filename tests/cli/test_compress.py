"""The command `compress`."""

import re
from pathlib import Path

import pandas as pd
import pytest
from conftest import Trained
from fork_server import ForkServer

from cli.helpers import assert_refused, rows, write_digits


def test_compress_prints_one_table_and_predict_takes_the_runs(
    trained: Trained, fork_server: ForkServer, tmp_path: Path
) -> None:
    home = tmp_path / "mlruns"
    trained.copy(home)
    words = ["compress", trained.finished, "--sparsity", "0.05", "--epochs", "1", "--distil", "--device", "cpu"]
    done = fork_server.run(words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pruned: model.widths (4, 8) -> (4, 7), optimizer.lr 0.1 -> 0.03, training.epochs 2 -> 1" in done.stdout
    assert "distilled: model.widths (4, 8) -> (4, 7), loss.teacher none -> this run\n" in done.stdout
    titles = ["original", "original, 8 bits", "pruned", "pruned, 8 bits", "distilled", "distilled, 8 bits"]
    for title in titles:
        assert re.search(
            rf"^ *{title} +\d+\.\d\d% +[\d,]+ +\d+\.\d+ +\d+\.\d+ +\d+\.\d\d *$", done.stdout, re.MULTILINE
        ), title
    runs = dict(rows(home / "mlflow.db", "SELECT value, run_uuid FROM tags WHERE key = 'method'"))
    assert runs.keys() == {"pruned", "distilled"}
    for run in runs.values():
        files = {file.name for file in (home / "exports" / run).iterdir()}
        assert {"model.onnx", "model.int8.onnx", "card.md", "MLmodel"} <= files
        [table] = (home / "artifacts").rglob(f"{run}/artifacts/compression.csv")
        assert pd.read_csv(table)["model"].tolist() == titles
        assert f"promote --run {run} --rules 'may_lose=2 size_factor=0.9'" in done.stdout
    card = (home / "exports" / runs["distilled"] / "card.md").read_text()
    assert f"Started from random ones, and learnt from the predictions of run `{trained.finished}`, too." in card
    (digit,) = write_digits(tmp_path, 1)
    again = fork_server.run(["predict", str(digit), "--model", run := runs["distilled"]], tmp_path)
    assert again.returncode == 0, again.stderr
    label = f"trial 0 (distilled, sparsity 0.05) of tiny-v1-digits, run {run}"
    assert again.stdout.startswith(f"model: {label}\n{digit}: ")


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["compress"], ["RUN: needs a value: a finished run's id, or models:/NAME@ALIAS; type `python -m pipeline"]),
        (["compress", "0" * 32], ["no runs yet in mlruns"]),
        (["compress", "0" * 32, "--sparsity", "1"], ["`--sparsity 1`: should be less than or equal to 0.99"]),
    ],
)
def test_bad_input_is_refused(words: list[str], lines: list[str], tmp_path: Path) -> None:
    assert_refused(words, lines, tmp_path)
