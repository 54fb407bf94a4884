"""The command `ensemble`, and the methods of `predict` whose tables it takes."""

from pathlib import Path

import numpy as np
import pytest
from conftest import Trained, run_forked, run_pipeline

from cli.helpers import assert_refused, write_digits
from pipeline.inference.predictions import read_predictions


def test_ensemble_averages_predictions_of_two_methods(trained: Trained, tmp_path: Path) -> None:
    files = write_digits(tmp_path, 30)
    tables = []
    for method in ("plain", "tta"):
        tables.append(tmp_path / f"{method}.csv")
        words = ["predict", str(tmp_path), "--method", method, "--model", trained.finished, "--output", str(tables[-1])]
        done = run_forked(*words, cwd=trained.home.parent)
        assert done.returncode == 0, done.stderr
        assert ("tta on the 144 validation images: " in done.stdout) == (method == "tta")
        assert "and 20 more" in done.stdout
    out = tmp_path / "mean.parquet"
    done = run_pipeline("ensemble", *map(str, tables), "--output", str(out), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{out}: 30 images, the mean of 2 files"
    plain, tta, mean = (read_predictions(path).drop(columns="label").set_index("id") for path in (*tables, out))
    assert len(mean) == len(files)
    assert not np.allclose(plain, tta)
    np.testing.assert_allclose(mean, (plain + tta) / 2)
    tables[1].write_text("".join(tables[1].read_text().splitlines(keepends=True)[:-1]))
    done = run_forked("ensemble", *map(str, tables), "--output", str(out), cwd=tmp_path)
    assert done.returncode == 3
    assert "ids" in done.stderr and str(tables[1]) in done.stderr


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["ensemble", "a.csv", "--output", "c.csv"], ["a.csv: an ensemble needs at least two tables"]),
        (["ensemble", "a.csv", "b.csv", "--output", "./a.csv"], ["`--output a.csv`: is one of the tables"]),
        (["ensemble", "a.csv", "./a.csv", "--output", "c.csv"], ["a.csv: is named twice; each file has one vote"]),
        (["ensemble", "a.csv", "b.csv"], ["NAME or RUNS: needs one study, or runs in its place; `python -m pipeline"]),
        (["ensemble", "attention", "--runs", "0" * 32], ["tables need `--output`"]),
        (["ensemble", "--runs", ""], ["NAME or RUNS: needs one study, or runs in its place; "]),
        (["ensemble", "--runs", f"{'0' * 32} 12"], ["`--runs 12`: not a run's id (32 of 0-9a-f)"]),
    ],
)
def test_bad_input_is_refused(words: list[str], lines: list[str], tmp_path: Path) -> None:
    assert_refused(words, lines, tmp_path)
