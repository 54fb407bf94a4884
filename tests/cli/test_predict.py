"""The command `predict`."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Trained, run_forked, run_pipeline
from PIL import Image

from cli.helpers import assert_refused, write_digits
from pipeline.inference.predictions import read_predictions
from pipeline.tracking.models import find_model


def test_predict_prints_model_classes_and_unusable_files(trained: Trained, tmp_path: Path) -> None:
    files = write_digits(tmp_path, 3)
    (tmp_path / "cut.png").write_bytes(files[0].read_bytes()[:60])
    (tmp_path / "empty.jpg").touch()
    out = tmp_path / "out.csv"
    words = [str(path) for path in (tmp_path / "cut.png", *files, tmp_path / "empty.jpg", tmp_path / "none.gif")]
    done = run_pipeline("predict", *words, "--output", str(out), "--show", cwd=trained.home.parent, DISPLAY="")
    assert done.returncode == 4, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first.startswith("model: the best finished run (no champion), trial 0 of tiny-v1-digits, run ")
    for file, line in zip(files, lines, strict=False):
        assert re.fullmatch(rf"{re.escape(str(file))}: \d \d+\.\d%, \d \d+\.\d%, \d \d+\.\d%", line)
    assert f"{out}: 3 images" in done.stdout
    assert "figure: mlruns/prediction.png" in done.stdout
    with Image.open(trained.home / "prediction.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5, "not blank"
    errors = done.stderr.splitlines()
    assert len(errors) == 3 and "Traceback" not in done.stderr
    for name, line in zip(("cut.png", "empty.jpg", "none.gif"), errors, strict=True):
        assert line.startswith(f"error: {tmp_path / name}: ")
    rows = out.read_text().splitlines()
    assert rows[0] == "id,label," + ",".join(f"p_{digit}" for digit in range(10))
    assert [row.split(",")[0] for row in rows[1:]] == [str(file) for file in files]


def test_closed_pipe_stops_nothing(trained: Trained, tmp_path: Path) -> None:
    """As `predict ... | head -1`, where the pipe is closed before the first line comes."""
    write_digits(tmp_path, 3)
    command = [sys.executable, "-m", "pipeline", "predict", str(tmp_path), "--output", str(tmp_path / "out.csv")]
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=trained.home.parent, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(read_predictions(tmp_path / "out.csv")) == 3


def test_odd_file_names_are_printed_on_one_line(trained: Trained, tmp_path: Path) -> None:
    from rich.console import Console

    assert Console().render_str(":smile:").plain != ":smile:", "what rich does by itself"
    (digit,) = write_digits(tmp_path, 1)
    names = [":smile:.png", "[red]x.png", "a\nerror: b.png", "c\x1b[31m.png", "d\re.png"]
    for name in names:
        shutil.copy(digit, tmp_path / name)
    digit.rename(digit.with_suffix(".heic"))
    out = tmp_path / "out.csv"
    done = run_forked("predict", str(tmp_path), "--output", str(out), cwd=trained.home.parent)
    assert done.returncode == 0, done.stderr
    shown = [
        f"{tmp_path}/{name}"
        for name in (":smile:.png", "[red]x.png", r"a\nerror: b.png", r"c\x1b[31m.png", r"d\re.png")
    ]
    assert [line.partition(".png: ")[0] + ".png" for line in done.stdout.splitlines()[1:-2]] == shown
    assert done.stdout.splitlines()[-2] == f"left out of {tmp_path}: 1 .heic"
    assert "\x1b" not in done.stdout
    assert list(read_predictions(out)["id"]) == shown


def test_failed_output_hides_no_unusable_file(trained: Trained, tmp_path: Path) -> None:
    (digit,) = write_digits(tmp_path, 1)
    (tmp_path / "mlruns").touch()
    with find_model(trained.home, None, trained.finished) as model:
        words = ["predict", str(digit), "none.png", "--model", str(model.folder), "--show"]
        done = run_forked(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines() == [
        "error: none.png: no such file",
        "error: mlruns/prediction.png: the figure can't be written: File exists",
    ]


def test_predict_reads_a_pickle_of_images(trained: Trained, tmp_path: Path) -> None:
    """As Kaggle's: no labels, its rows numbered."""
    import pickle

    with find_model(trained.home, None, trained.finished) as model:
        shutil.copytree(model.folder, tmp_path / "model")
    images = np.random.RandomState(0).randint(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    (tmp_path / "cifar_test_nolabels.pkl").write_bytes(pickle.dumps({b"data": images}))
    words = ["predict", "cifar_test_nolabels.pkl", "--model", "model", "--output", "out.parquet"]
    done = run_forked(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "model: model" in done.stdout
    assert list(read_predictions(tmp_path / "out.parquet")["id"]) == [str(number) for number in range(12)]
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["predict"], ["IMAGE: needs a value: images, folders of images", "type `python -m pipeline predict IMAGE`"]),
        (["predict", "cat.jpg"], ["no finished run yet"]),
        (
            ["predict", ""],
            ["IMAGE: is empty; name images or folders; `python -m pipeline predict .` takes the current"],
        ),
        (["predict", "cat.jpg", "--model", __file__], ["is a file; name its folder: ", "tests/cli"]),
        (
            ["predict", "~nobody/cat.jpg", "--model", "~nobody/x"],
            ["model ~nobody/x: neither a folder, nor", "no runs yet in mlruns"],
        ),
        (
            ["predict", "cat.jpg", "--method", "ttta"],
            ["`--method ttta`: not one of plain, tta,", "(did you mean tta?)"],
        ),
        (["predict", "cat.jpg", "--device", "gpu"], ["`--device gpu`: should be auto, cpu, cuda or cuda:N"]),
        (["predict", "cat.jpg", "--output", "out.xls"], ["out.xls", "should end in .csv or .parquet"]),
    ],
)
def test_bad_input_is_refused(words: list[str], lines: list[str], tmp_path: Path) -> None:
    assert_refused(words, lines, tmp_path)
