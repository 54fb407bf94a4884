"""The real commands, as a user types them, each in a process of its own."""

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TINY = "data.image_size=8 model.widths=[4,8] model.blocks_per_stage=1 model.reduction=4 augmentation.crop_padding=2"

ARTIFACTS = {
    "recipe.json",
    "environment.txt",
    "predictions.parquet",
    "per_class.csv",
    "confusion_matrix.png",
    "learning_curves.png",
    "reliability.png",
    "most_confident_correct.png",
    "most_confident_wrong.png",
    "weights.safetensors",
    "weights_plain.safetensors",
    "checkpoint.json",
}


def pipeline(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", *words]
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", **environment}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=settings)


def rows(database: Path, query: str) -> list[tuple]:
    with sqlite3.connect(database) as connection:
        return connection.execute(query).fetchall()


def test_a_study_on_digits_from_nothing_to_links_and_on(tmp_path: Path) -> None:
    study = ("study", "attention", "--dataset", "digits", "--epochs", "3", "--set", TINY)
    first = pipeline(*study, "--trials", "2", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "1,294 training and 144 validation images of 10 classes" in first.stdout
    assert "trial 0: the control, the base recipe" in first.stdout
    assert re.search(r"epoch 3/3: \d+ images/s, loss \d\.\d+ train \d\.\d+ val, accuracy 0\.\d+", first.stdout)
    assert "attention-v1-digits: best 2 of 2 trials, validation split" in first.stdout
    for link in ("make ui", "#/experiments/1/runs?workflowType=machine_learning&orderByKey=", "#/compare-runs?runs="):
        assert link in first.stdout
    assert "Traceback" not in first.stderr

    runs = tmp_path / "mlruns"
    trials = rows(runs / "optuna.db", "select number, state from trials")
    assert trials == [(0, "COMPLETE"), (1, "COMPLETE")]
    ended = rows(runs / "mlflow.db", "select name, status from runs order by start_time")
    names = ["attention-v1-digits", "trial 0 (control)", "trial 1"]
    assert ended == [(name, "FINISHED") for name in names]
    epochs = "select count(*) from metrics where key = 'val/accuracy' group by run_uuid"
    assert rows(runs / "mlflow.db", epochs) == [(3,), (3,)], "each epoch once"
    for folder in runs.glob("artifacts/*/artifacts"):
        there = {file.name for file in folder.iterdir()} - {"diff.patch"}
        assert there == ARTIFACTS
    finals = {key for (key,) in rows(runs / "mlflow.db", "select distinct key from metrics")}
    assert {"val/f1/7", "val/precision/7", "val/recall/7", "val/ece", "model/parameters", "model/latency_ms"} <= finals

    more = pipeline(*study, "--trials", "3", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    assert "attention-v1-digits: 2 of 3 trials" in more.stdout
    assert "trial 0:" not in more.stdout.split("best")[0]
    assert len(rows(runs / "optuna.db", "select number from trials")) == 3

    other = pipeline(*study[:5], "2", *study[6:], "--trials", "3", cwd=tmp_path)
    assert other.returncode == 2
    assert "  base training.epochs: 3 then, 2 now" in other.stderr
    assert "VERSION=2" in other.stderr

    beside = pipeline(*study[:5], "1", *study[6:], "--trials", "1", "--version", "2", cwd=tmp_path)
    assert beside.returncode == 0, beside.stderr
    assert "attention-v2-digits" in beside.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_study_leaves_nothing_running_and_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    words = ["study", "attention", "--dataset", "digits", "--epochs", "400", "--trials", "1", "--set", TINY]
    command = [sys.executable, "-m", "pipeline", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=out, env=environment)
        limit = time.monotonic() + 120
        while "epoch 2/400:" not in log.read_text() and time.monotonic() < limit:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(30) == (130 if number == signal.SIGTERM else -number)
    runs = tmp_path / "mlruns"
    if number == signal.SIGTERM:
        assert "interrupted; the same command goes on" in log.read_text()
        assert rows(runs / "optuna.db", "select count(*) from trials where state = 'RUNNING'") == [(0,)]
        assert rows(runs / "mlflow.db", "select distinct status from runs") == [("KILLED",)]
    else:
        assert rows(runs / "optuna.db", "select count(*) from trials where state = 'RUNNING'") == [(1,)]

    # The interrupted trial is asked again by the resumed study; stop it once it is seen to be under way.
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=out, env=environment)
        while "epoch 1/400:" not in log.read_text() and time.monotonic() < limit + 60:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 130
    assert "trial 1: the control, the base recipe" in log.read_text()
    assert rows(runs / "optuna.db", "select count(*) from trials where state = 'RUNNING'") == [(0,)]
    assert rows(runs / "mlflow.db", "select count(*) from runs where status = 'RUNNING'") == [(0,)]


def test_the_whole_of_cifar10_by_the_real_command(tmp_path: Path, cifar10_dir: Path) -> None:
    tiny = f"{TINY} training.batch_size=1000"
    words = ("study", "attention", "--data-dir", str(cifar10_dir), "--trials", "1", "--epochs", "1", "--set", tiny)
    done = pipeline(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "45,000 training and 5,000 validation images of 10 classes" in done.stdout
    keys = {key for (key,) in rows(tmp_path / "mlruns" / "mlflow.db", "select distinct key from metrics")}
    assert {f"val/f1/{name}" for name in ("airplane", "cat", "truck")} <= keys


def test_a_slice_of_cifar10_as_a_users_own_folder(tmp_path: Path, cifar10_dir: Path) -> None:
    from pipeline.data.datasets import load

    whole = load("cifar10", 32, cifar10_dir)
    for label, name in ((3, "cat [tabby]"), (5, "dög")):
        folder = tmp_path / "pets" / "train" / name
        folder.mkdir(parents=True)
        for i in np.flatnonzero(whole.train.labels.numpy() == label)[:60]:
            Image.fromarray(whole.train.images[i].permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    words = ("study", "attention", "--dataset", "pets", "--trials", "1", "--epochs", "1")
    done = pipeline(*words, "--set", f"{TINY} data.image_size=24", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "attention-v1-pets on" in done.stdout
    keys = {key for (key,) in rows(tmp_path / "mlruns" / "mlflow.db", "select distinct key from metrics")}
    assert "val/f1/cat _tabby_" in keys

    (tmp_path / "pets" / "train" / "dög" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    (tmp_path / "pets" / "train" / "dög" / "empty.jpg").touch()
    before = rows(tmp_path / "mlruns" / "optuna.db", "select count(*) from trials")
    refused = pipeline(*words, cwd=tmp_path)
    assert refused.returncode == 3
    assert "broken.png" in refused.stderr
    assert "empty.jpg" in refused.stderr
    assert rows(tmp_path / "mlruns" / "optuna.db", "select count(*) from trials") == before


def test_cifar10_that_cannot_be_had_is_one_message_with_the_ways_out(tmp_path: Path) -> None:
    closed = "http://127.0.0.1:9"
    done = pipeline("study", "attention", cwd=tmp_path, http_proxy=closed, https_proxy=closed, no_proxy="")
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert f"not in {tmp_path / 'data' / 'cifar-10-batches-py'}" in done.stderr
    assert "download from" in done.stderr
    assert "DATASET=digits" in done.stderr
    left = [file for file in tmp_path.rglob("*") if file.is_file() and file.parent.name != "mlruns"]
    assert not left
    assert not (tmp_path / "mlruns" / "optuna.db").exists()


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["study", "atention"], ["error: no study atention (did you mean attention?)", "error: studies: attention"]),
        (["study", "../attention"], ["error: study name '../attention': must be small letters"]),
        (
            [
                "study",
                "attention",
                "--trials",
                "0",
                "--epochs",
                "x",
                "--timeout",
                "-1",
                "--seed",
                "-1",
                "--device",
                "gpu",
            ],
            ["TRIALS = 0:", "EPOCHS = x:", "TIMEOUT = -1:", "SEED = -1:", "DEVICE = gpu: should be auto, cpu, cuda"],
        ),
        (
            [
                *(
                    "study",
                    "attention",
                    "--set",
                    "optimizer.lr=-1 training.epoch=0 loss=3",
                    "--set",
                    "lr",
                    "--trials",
                    "0",
                ),
                *("--storage", "sqlite:///mlruns/mlflow.db"),
            ],
            [
                *("loss: no such field", "SET lr: should be FIELD=VALUE", "optimizer.lr = -1:", "TRIALS = 0:"),
                "training.epoch: no such field (did you mean training.epochs?)",
                "are the same database",
            ],
        ),
        (
            ["study", "attention", "--set", "optimizer.lr=-1 training.epochs=0 model.network=vgg"],
            ["optimizer.lr = -1:", "training.epochs = 0:", "model.network = vgg:"],
        ),
        (["study", "attention", "--set", 'model.widths=[4, -8] data.dataset="x'], ["model.widths.1 = -8:"]),
        (["study", "attention", "--set", "training.seed=" + "9" * 5000], ["training.seed = 999"]),
        (["study", "attention", "--storage", "sqlite://"], ["STORAGE sqlite://: keeps nothing"]),
        (["study", "attention", "--device", "cuda:" + "9" * 30], ["should be auto, cpu, cuda or cuda:N"]),
        (["study", "attention", "--dataset", "cifar100"], ["data.dataset = cifar100:"]),
        (
            ["study", "attention", "--set", "optimizer.lr=5"],
            ["optimizer.lr = 5.0 in the base recipe: outside the space"],
        ),
        (["study", "attention", "--device", "cuda:99"], ["DEVICE cuda:99: torch sees"]),
        (["ui"], ["no runs yet in mlruns"]),
    ],
)
def test_bad_input_is_told_in_lines_and_leaves_nothing(words: list[str], lines: list[str], tmp_path: Path) -> None:
    done = pipeline(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for line in lines:
        assert line in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_public_surface_is_frozen() -> None:
    """Commands and options are what scripts are written against."""
    from typer.main import get_command

    from pipeline.cli import app

    group = get_command(app)
    surface = {
        name: sorted(option for parameter in command.params for option in parameter.opts)
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }
    assert surface == {
        "study": [
            *("--data-dir", "--dataset", "--device", "--epochs", "--seed", "--set", "--storage", "--timeout"),
            *("--tracking-uri", "--trials", "--version", "name"),
        ],
        "ui": ["--port", "--tracking-uri", "name"],
    }


# ------------------------------------------------------------------------------------------------------------- make


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the Makefile whose .venv is ready and whose Python prints the words that it gets, one a line."""
    folder = tmp_path_factory.mktemp("make")
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "pyproject.toml").touch()
    (folder / "studies").mkdir()
    (folder / "studies" / "attention.py").touch()
    fake = folder / ".venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "[$word]"; done\n')
    fake.chmod(0o755)
    (folder / ".venv" / "ready").touch()
    return folder


def make(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "DATA_DIR"}
    command = ["make", "--no-print-directory", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=clean | environment)


def test_make_study_passes_every_variable_on(made: Path) -> None:
    names = ["TRIALS", "EPOCHS", "TIMEOUT", "DATASET", "DATA_DIR", "DEVICE", "SEED", "VERSION", "STORAGE"]
    words = [f"{name}={name.lower()} value" for name in [*names, "TRACKING_URI", "SET"]]
    done = make(made, "study", "NAME=attention", *words)
    got = re.findall(r"\[(.*)\]", done.stdout)
    expected = [f"--{name.lower().replace('_', '-')}={name.lower()} value" for name in [*names, "TRACKING_URI", "SET"]]
    assert got == ["-m", "pipeline", "study", *expected, "--", "attention"]


@pytest.mark.parametrize(
    "name",
    ["x'; touch pwned; '", "$(shell touch pwned)", "`touch pwned`", '"; touch pwned; "', "$$(touch pwned)", "a b"],
)
def test_make_passes_hostile_words_on_as_they_are(name: str, made: Path) -> None:
    for words in ([f"NAME={name}"], ["NAME=attention", f"DATASET={name}"]):
        done = make(made, "study", *words)
        assert f"{name}]" in done.stdout, done.stdout + done.stderr
        assert not (made / "pwned").exists()


def test_make_study_without_a_name_says_what_to_type(made: Path) -> None:
    for environment in ({}, {"NAME": "my-computer"}):  # some shells export NAME
        done = make(made, "study", **environment)
        assert done.returncode == 2
        assert "which study? make study NAME=attention (in studies/: attention)" in done.stderr


def test_make_refuses_a_mistyped_variable_and_ignores_exported_ones(made: Path) -> None:
    done = make(made, "study", "NAME=attention", "DATSET=digits")
    assert done.returncode == 2
    assert "no such variable: DATSET" in done.stderr
    exported = make(made, "study", "NAME=attention", VERSION="1.2.3", DATA_DIR="/my data").stdout
    assert "--version" not in exported
    assert "[--data-dir=/my data]" in exported


def test_make_help_lists_every_target_in_one_line_each() -> None:
    listed = re.findall(r"^  make (\S+) +\S", make(ROOT, "help").stdout, re.MULTILINE)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert listed == targets
