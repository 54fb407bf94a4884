"""The real commands, as a user types them, each in a process of its own."""

import hashlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import Trained
from PIL import Image

from pipeline.inference.predictions import read_predictions
from pipeline.tracking import queries
from pipeline.tracking.models import find_model
from pipeline.tracking.tags import State
from pipeline.tracking.tracker import MlflowTracker

ROOT = Path(__file__).resolve().parents[1]
TINY = "data.image_size=8 model.widths=[4,8] model.blocks_per_stage=1 model.reduction=4 augmentation.crop_padding=2"

ARTIFACTS = {
    "recipe.json",
    "environment.txt",
    "predictions.parquet",
    "per_class.csv",
    "prediction_methods.csv",
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
    study = ("study", "attention", "--dataset", "digits", "--epochs", "1", "--set", TINY)
    first = pipeline(*study, "--trials", "2", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "1,294 training and 144 validation images of 10 classes" in first.stdout
    assert "trial 0: the control, the base recipe" in first.stdout
    assert re.search(r"epoch 1/1: \d+ images/s, loss \d\.\d+ train \d\.\d+ val, accuracy 0\.\d+", first.stdout)
    assert "attention-v1-digits: best 2 of 2 trials, validation split" in first.stdout
    for link in ("make ui", "#/experiments/1/runs?workflowType=machine_learning&orderByKey=", "#/compare-runs?runs="):
        assert link in first.stdout
    for command in ("compare", "finals", "promote"):
        assert f"  make {command} NAME=attention-v1-digits\n" in first.stdout, "what comes next"
    assert "Traceback" not in first.stderr

    runs = tmp_path / "mlruns"
    trials = rows(runs / "optuna.db", "select number, state from trials")
    assert trials == [(0, "COMPLETE"), (1, "COMPLETE")]
    ended = rows(runs / "mlflow.db", "select name, status from runs order by start_time")
    names = ["attention-v1-digits", "trial 0 (control)", "trial 1"]
    assert ended == [(name, "FINISHED") for name in names]
    epochs = "select count(*) from metrics where key = 'val/accuracy' group by run_uuid"
    assert rows(runs / "mlflow.db", epochs) == [(1,), (1,)], "each epoch once"
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
    assert "  base training.epochs: 1 then, 2 now" in other.stderr
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
    assert re.search("attention-v1-pets-[0-9a-f]{6} on", done.stdout)
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


def test_a_study_of_a_folder_that_moved_is_finished_where_it_lies_now(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    from pipeline.tracking.tracker import MlflowTracker

    digits = load_digits()
    for number in np.flatnonzero(digits.target < 2)[:24]:
        folder = tmp_path / "digits" / "train" / str(digits.target[number])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[number] * 15).astype(np.uint8)).save(folder / f"{number}.png")
    words = ("--epochs", "1", "--trials", "1", "--set", f"{TINY} data.image_size=16 training.batch_size=8")
    done = pipeline("study", "attention", "--dataset", "./digits", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search("attention-v1-digits-[0-9a-f]{6} on", done.stdout), (
        "not the study of the digits that need no folder"
    )
    assert "caution: 2 validation images say little" in done.stdout
    moved = (tmp_path / "digits").rename(tmp_path / "zeros and ones")
    refused = pipeline("promote", "attention", cwd=tmp_path)
    assert refused.returncode == 3
    assert f"is not in {tmp_path / 'digits'}; DATASET= names the folder" in refused.stderr
    finals = ("finals", "attention-v1-digits", "--top", "1", "--seeds", "1", "--dataset", moved.name)
    done = pipeline(*finals, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "caution: 2 validation images say little" in done.stdout
    [study] = queries.studies(MlflowTracker(tmp_path / "mlruns"))
    assert study.places == [str(moved), str(tmp_path / "digits")], "where it is found without the option"


def test_cifar10_that_cannot_be_had_is_one_message_with_the_ways_out(tmp_path: Path) -> None:
    closed = "http://127.0.0.1:9"
    done = pipeline("study", "attention", cwd=tmp_path, http_proxy=closed, https_proxy=closed, no_proxy="")
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert f"not in {tmp_path / 'data' / 'cifar-10-batches-py'}" in done.stderr
    assert f"failed (through http_proxy={closed} https_proxy={closed}): " in done.stderr
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
        (["study", "attention", "--workers", "0", "--hang", "soon"], ["WORKERS = 0:", "HANG = soon:"]),
        (["plan", "attention", "--workers", "many"], ["WORKERS = many:"]),
        (["study", "attention", "--storage", "sqlite://"], ["STORAGE sqlite://: keeps nothing"]),
        (["study", "attention", "--device", "cuda:" + "9" * 30], ["should be auto, cpu, cuda or cuda:N"]),
        (["study", "attention", "--dataset", "cifar100"], ["data.dataset = cifar100:"]),
        (["study", "attention", "--device", "cuda:99"], ["DEVICE cuda:99: torch sees"]),
        (
            ["study", "attention", "--device", "cpu", "--set", "training.execution=graphed"],
            ["training.execution = graphed: a graph needs a GPU, and this is cpu; SET=training.execution=eager"],
        ),
        (
            ["study", "attention", "--epochs", "2", "--set", "training.epochs=3 optimizer.lr=1 optimizer.lr=2"],
            ["SET training.epochs=3: was set to 2 already; say one", "SET optimizer.lr=2: was set to 1 already"],
        ),
        (
            ["plan", "attention", "--set", "optimizer.sgd_momentum=0.5"],
            ["no such field where optimizer.name is sgd, adam or adamw; muon can have it"],
        ),
        (
            ["bench", "--against", "peer.py", "--model", "plain"],
            ["AGAINST peer.py: no such file; a script that trains"],
        ),
        (["ui"], ["no runs yet in mlruns"]),
        (["promote"], ["which model? make promote NAME=attention takes a study's"]),
        (["promote", "a", "--run", "b"], ["which model?"]),
        (["promote", "--run", "b"], ["RUN b: not a run's id"]),
        (["promote", "a", "--force"], ['FORCE=1 and REASON="..." go together']),
        (["promote", "a", "--rule", "alpha=2 x=1"], ["RULES x=1: should be NAME=VALUE", "RULES alpha = 2:"]),
        (["promote", "attention"], ["no runs yet in mlruns"]),
        (["rollback"], ["REASON: say why"]),
        (["rollback", "--reason", "x", "--version", "0"], ["VERSION 0: should be a number"]),
        (["rollback", "--reason", "x"], ["no runs yet in mlruns"]),
        (["history"], ["no promotions yet in mlruns"]),
        (["audit"], ["no runs yet in mlruns"]),
        (["relocate"], ["there is no mlflow.db here; run this where mlruns/ lies now"]),
        (["finals", "attention"], ["no runs yet in mlruns"]),
        (["finals", "attention", "--device", "gpu"], ["DEVICE gpu: should be auto, cpu, cuda or cuda:N"]),
        (["reproduce", "0" * 32], ["no runs yet in mlruns"]),
        (["compare", "attention"], ["no runs yet in mlruns"]),
        (["predict", "cat.jpg"], ["no finished run yet: make study NAME=attention DATASET=digits"]),
        (["predict", "cat.jpg", "--method", "ttta"], ["METHOD ttta: not one of plain, tta,", "(did you mean tta?)"]),
        (["predict", "cat.jpg", "--device", "gpu"], ["DEVICE gpu: should be auto, cpu, cuda or cuda:N"]),
        (["predict", "cat.jpg", "--output", "out.xls"], ["out.xls: should end in .csv or .parquet"]),
        (["bench", "--model", "improvd"], ["no study improvd (did you mean improved?)"]),
        (["bench", "--against", "peer.py"], ["AGAINST: compares one network; say MODEL=improved"]),
        (
            ["bench", "--against", "peer.py", "--model", "plain", "--dataset", "digits"],
            ["DATASET digits: peers train on CIFAR-10; leave it out"],
        ),
        (["ensemble", "a.csv", "--output", "c.csv"], ["a.csv: one file; an ensemble needs at least two"]),
        (["ensemble", "a.csv", "./a.csv", "--output", "c.csv"], ["a.csv: named twice; each file has one voice"]),
        (["export"], ["no finished run yet"]),
        (["serve"], ["no finished run yet"]),
        (["predict", "~nobody/cat.jpg", "--model", "~nobody/x"], ["no finished run yet"]),
    ],
)
def test_bad_input_is_told_in_lines_and_leaves_nothing(words: list[str], lines: list[str], tmp_path: Path) -> None:
    done = pipeline(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for line in lines:
        assert line in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_store_that_can_not_be_opened_is_told_before_data_is_downloaded(tmp_path: Path) -> None:
    for option, uri in (("--tracking-uri", "http://127.0.0.1:9"), ("--storage", "postgresql://127.0.0.1:9/x")):
        done = pipeline("study", "attention", option, uri, cwd=tmp_path)
        assert done.returncode == 2, done.stdout + done.stderr
        assert f"{option[2:].upper().replace('-', '_')} " in done.stderr
        assert "download" not in done.stderr


def test_the_public_surface_is_frozen() -> None:
    """Commands and options are what scripts are written against."""
    from typer.main import get_command

    from pipeline.cli.main import app

    group = get_command(app)
    surface = {
        name: sorted(option for parameter in command.params for option in parameter.opts)
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }
    assert surface == {
        "audit": ["--fix", "--storage", "--tracking-uri"],
        "bench": ["--against", "--data-dir", "--dataset", "--device", "--json", "--model"],
        "finals": ["--data-dir", "--dataset", "--device", "--epochs", "--seeds", "--top", "--tracking-uri", "name"],
        "bench-gpu": ["--airbench", "--data-dir", "--only", "--output", "--peer"],
        "plan": [
            *("--data-dir", "--dataset", "--device", "--epochs", "--seed", "--set", "--trials", "--version"),
            *("--workers", "name"),
        ],
        "compare": ["--data-dir", "--dataset", "--output", "--tracking-uri", "names"],
        "ensemble": ["--output", "files"],
        "export": ["--data-dir", "--dataset", "--int8", "--output", "--tracking-uri", "model"],
        "history": ["--model", "--tracking-uri"],
        "promote": [
            *("--data-dir", "--dataset", "--force", "--model", "--reason", "--rule", "--run", "--tracking-uri", "name"),
        ],
        "rollback": ["--model", "--reason", "--tracking-uri", "--version"],
        "predict": ["--device", "--method", "--model", "--output", "--show", "--tracking-uri", "files"],
        "reproduce": ["--data-dir", "--dataset", "--device", "--tolerance", "--tracking-uri", "run"],
        "relocate": [],
        "serve": ["--port", "--tracking-uri", "model"],
        "study": [
            *("--cluster", "--data-dir", "--dataset", "--device", "--epochs", "--hang", "--patience", "--seed"),
            *("--set", "--storage", "--timeout", "--tracking-uri", "--trials", "--version", "--workers", "name"),
        ],
        "sync": ["--tracking-uri"],
        "ui": ["--port", "--tracking-uri", "name"],
    }


# ------------------------------------------------------------------------------------------- MLflow's server goes away


@pytest.fixture
def fading() -> Iterator[str]:
    """The address of an MLflow server that answers once, that it has no experiments, and then only the half."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            whole = not asked
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "2" if whole else "100")
            self.end_headers()
            self.wfile.write(b"{}")
            self.close_connection = True

        do_POST = do_GET

        def log_message(self, *words: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}


def test_a_server_that_goes_away_is_told_in_a_line(fading: str, tmp_path: Path) -> None:
    done = pipeline("compare", "attention", "--tracking-uri", fading, cwd=tmp_path, **IMPATIENT)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: MLflow doesn't answer any more (API request to {fading}/")
    assert line.endswith("; once it does, the same command goes on")


def test_a_study_that_is_done_only_lacks_its_links_where_the_server_goes_away_then(
    fading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.cli import study
    from pipeline.cli.common import make_console

    for name, value in IMPATIENT.items():
        monkeypatch.setenv(name, value)
    tracker = MlflowTracker(tmp_path / "mlruns", fading)
    assert study._links(make_console(), tracker, "attention") == {}
    assert f"no links: MLflow doesn't answer any more (API request to {fading}/" in capsys.readouterr().out
    with pytest.raises(AttributeError):  # a bug isn't hidden
        study._links(make_console(), SimpleNamespace(), "attention")


# ---------------------------------------------------------------------------------------------------------- compare


def test_compare_shows_the_best_trials_and_writes_a_page(trained: Trained, tmp_path: Path) -> None:
    done = pipeline("compare", "tiny", "--output", str(tmp_path / "t.html"), cwd=trained.home.parent, COLUMNS="100")
    assert done.returncode == 0, done.stderr
    table, _, links = done.stdout.partition("page: ")
    assert "tiny-v1-digits: best 1 of 2 trials, 1 finished" in table
    assert re.search(r"^ +0 +0\.\d{4} .+ \(0\.\d{3}\) +\d+\.\d s +[\d,]+ +\d+\.\d\d ms", table, re.MULTILINE)
    assert max(map(len, table.splitlines()[1:])) <= 100
    assert links.startswith(f"{tmp_path / 't.html'} (") and "#/experiments/1/runs?workflowType=" in links
    assert (tmp_path / "t.html").read_text().startswith("<!DOCTYPE html>")

    wrong = pipeline("compare", "tiny", "tinny", cwd=trained.home.parent)
    assert wrong.returncode == 2 and "error: no study tinny in the tracking store" in wrong.stderr
    folder = pipeline("compare", "tiny", "--output", str(tmp_path), cwd=trained.home.parent)
    assert folder.returncode == 2 and "is a folder; name a file" in folder.stderr
    assert not (trained.home / "reports").exists()


def test_compare_needs_trials(trained: Trained, tmp_path: Path) -> None:
    trained.copy(tmp_path / "mlruns")
    tracker = MlflowTracker(tmp_path / "mlruns")
    tracker.open_study("bare-v1-digits", "?", "val/accuracy", []).end(State.FINISHED)
    assert tracker.flush(30)
    bare = pipeline("compare", "tiny bare", cwd=tmp_path)
    assert bare.returncode == 2 and "error: bare-v1-digits: has no trials yet; make study runs some" in bare.stderr
    assert not bare.stdout and not (tmp_path / "mlruns" / "reports").exists()


# ---------------------------------------------------------------------------------------------------------- predict


def write_digits(folder: Path, count: int) -> list[Path]:
    """Some of scikit-learn's digits as PNG files, named by what they show."""
    from sklearn.datasets import load_digits

    images = load_digits()
    files = []
    for number in range(count):
        grey = (images.images[number] * 255 / 16).round().astype(np.uint8)
        files.append(folder / f"{number}-shows-{images.target[number]}.png")
        Image.fromarray(grey).save(files[-1])
    return files


def test_predict_names_the_model_each_class_and_what_was_no_use(trained: Trained, tmp_path: Path) -> None:
    files = write_digits(tmp_path, 3)
    (tmp_path / "cut.png").write_bytes(files[0].read_bytes()[:60])
    (tmp_path / "empty.jpg").touch()
    out = tmp_path / "out.csv"
    words = [str(path) for path in (tmp_path / "cut.png", *files, tmp_path / "empty.jpg", tmp_path / "none.gif")]
    done = pipeline("predict", *words, "--output", str(out), "--show", cwd=trained.home.parent, DISPLAY="")
    assert done.returncode == 4, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first.startswith("model: the best finished run (no champion), trial 0 of tiny-v1-digits, run ")
    for file, line in zip(files, lines, strict=False):
        assert re.fullmatch(rf"{re.escape(str(file))}: \d \d+\.\d%, \d \d+\.\d%, \d \d+\.\d%", line)
    assert f"{out}: 3 images" in done.stdout
    assert "picture: mlruns/prediction.png" in done.stdout
    with Image.open(trained.home / "prediction.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5, "not blank"
    errors = done.stderr.splitlines()
    assert len(errors) == 3 and "Traceback" not in done.stderr
    for name, line in zip(("cut.png", "empty.jpg", "none.gif"), errors, strict=True):
        assert line.startswith(f"error: {tmp_path / name}: ")
    rows = out.read_text().splitlines()
    assert rows[0] == "id,label," + ",".join(f"p_{digit}" for digit in range(10))
    assert [row.split(",")[0] for row in rows[1:]] == [str(file) for file in files]


def test_methods_differ_and_say_what_they_gain_and_an_ensemble_averages_them(trained: Trained, tmp_path: Path) -> None:
    files = write_digits(tmp_path, 30)
    tables = []
    for method in ("plain", "tta"):
        tables.append(tmp_path / f"{method}.csv")
        words = ["predict", str(tmp_path), "--method", method, "--model", trained.finished, "--output", str(tables[-1])]
        done = pipeline(*words, cwd=trained.home.parent)
        assert done.returncode == 0, done.stderr
        assert ("tta on the 144 validation images: " in done.stdout) == (method == "tta")
        assert "and 20 more" in done.stdout
    out = tmp_path / "mean.parquet"
    done = pipeline("ensemble", *map(str, tables), "--output", str(out), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{out}: 30 images, the mean of 2 files"
    plain, tta, mean = (read_predictions(path).drop(columns="label").set_index("id") for path in (*tables, out))
    assert len(mean) == len(files)
    assert not np.allclose(plain, tta)
    np.testing.assert_allclose(mean, (plain + tta) / 2)
    tables[1].write_text("".join(tables[1].read_text().splitlines(keepends=True)[:-1]))
    done = pipeline("ensemble", *map(str, tables), "--output", str(out), cwd=tmp_path)
    assert done.returncode == 3
    assert "its ids are not those of" in done.stderr


def test_a_reader_who_leaves_early_stops_nothing(trained: Trained, tmp_path: Path) -> None:
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


def test_odd_names_reach_terminal_and_table_on_one_line_as_they_are(trained: Trained, tmp_path: Path) -> None:
    from rich.console import Console

    assert Console().render_str(":smile:").plain != ":smile:", "what rich does by itself"
    (digit,) = write_digits(tmp_path, 1)
    names = [":smile:.png", "[red]x.png", "a\nerror: b.png", "c\x1b[31m.png", "d\re.png"]
    for name in names:
        shutil.copy(digit, tmp_path / name)
    digit.unlink()
    out = tmp_path / "out.csv"
    done = pipeline("predict", str(tmp_path), "--output", str(out), cwd=trained.home.parent)
    assert done.returncode == 0, done.stderr
    shown = [
        f"{tmp_path}/{name}"
        for name in (":smile:.png", "[red]x.png", r"a\nerror: b.png", r"c\x1b[31m.png", r"d\re.png")
    ]
    assert [line.partition(".png: ")[0] + ".png" for line in done.stdout.splitlines()[1:-1]] == shown
    assert "\x1b" not in done.stdout
    assert list(read_predictions(out)["id"]) == shown


def test_what_can_not_be_written_hides_no_useless_file(trained: Trained, tmp_path: Path) -> None:
    (digit,) = write_digits(tmp_path, 1)
    (tmp_path / "mlruns").touch()
    with find_model(trained.home, None, trained.finished) as model:
        words = ["predict", str(digit), "none.png", "--model", str(model.folder), "--show"]
        done = pipeline(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines() == [
        "error: none.png: no such file",
        "error: mlruns/prediction.png: the picture can't be written: File exists",
    ]


def test_help_tells_the_exit_codes() -> None:
    from typer.testing import CliRunner

    from pipeline.cli.main import app

    text = " ".join(CliRunner().invoke(app, ["--help"], env={"COLUMNS": "300"}).output.split())
    assert "Hyper-parameter studies for image classifiers. Exit codes: 0 done, 1 a bug" in text


def test_a_pickle_of_images_is_predicted_by_a_folders_model(trained: Trained, tmp_path: Path) -> None:
    """As Kaggle's: no labels, its rows numbered."""
    import pickle

    with find_model(trained.home, None, trained.finished) as model:
        shutil.copytree(model.folder, tmp_path / "model")
    images = np.random.RandomState(0).randint(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    (tmp_path / "cifar_test_nolabels.pkl").write_bytes(pickle.dumps({b"data": images}))
    words = ["predict", "cifar_test_nolabels.pkl", "--model", "model", "--output", "out.parquet"]
    done = pipeline(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "model: model" in done.stdout
    assert list(read_predictions(tmp_path / "out.parquet")["id"]) == [str(number) for number in range(12)]
    assert not (tmp_path / "mlruns").exists()


# ------------------------------------------------------------------------------------------------------------- ship


def test_export_writes_a_model_and_its_8_bit_form_that_predict_and_serve_take(trained: Trained, tmp_path: Path) -> None:
    (digit,) = write_digits(tmp_path, 1)
    out = tmp_path / "exported"
    done = pipeline("export", trained.finished, "--output", str(out), "--int8", cwd=trained.home.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"model: trial 0 of tiny-v1-digits, run {trained.finished}\n")
    assert re.search(
        r"differ by \de-\d+ in probability at most \(allowed: 0.0001\) on the 144 images of the validation split, in "
        r"batches of 1, 2, 7, 128 and 500",
        done.stdout,
    )
    for row in ("accuracy, validation split", "macro-F1", "size, MB", "one image, 2 threads, ms"):
        assert re.search(rf"^ *{row} +\d+\.\d+%? +\d+\.\d+%? *$", done.stdout, re.MULTILINE), done.stdout
    files = {file.name for file in out.iterdir()}
    assert {"model.onnx", "model.int8.onnx", "weights.safetensors", "recipe.json", "card.md", "MLmodel"} <= files
    again = pipeline("predict", str(digit), "--model", str(out), cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith(f"model: {out}\n{digit}: ")


def test_export_with_8_bits_says_what_is_wrong_with_the_data_before_it_writes(trained: Trained, tmp_path: Path) -> None:
    with find_model(trained.home, None, trained.finished) as model:
        shutil.copytree(model.folder, tmp_path / "model")
    record = json.loads((tmp_path / "model" / "checkpoint.json").read_text())
    record["facts"]["data_digest"] = "other pixels"
    body = {key: record[key] for key in ("format", "facts", "sha256")}
    record["digest"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (tmp_path / "model" / "checkpoint.json").write_text(json.dumps(record))
    done = pipeline("export", "model", "--int8", "--output", "out", cwd=tmp_path)
    assert done.returncode == 3
    first, second, third = done.stderr.splitlines()
    assert first.startswith("error: INT8=1 needs the data set that the model was trained on")
    assert re.match(
        f"  the model of run {trained.finished}: its data set, digest other pixel.*; DATA_DIR= says", second
    )
    assert "holds other images" in third
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


# ------------------------------------------------------------------------------------------- promote, rollback, history


def test_a_champion_is_made_told_of_and_refuses_to_be_rolled_back(trained: Trained, tmp_path: Path) -> None:
    trained.copy(tmp_path / "mlruns")
    elsewhere = {"MLFLOW_REGISTRY_URI": "sqlite:///other.db", "MLFLOW_RUN_ID": "0" * 32}  # of this command alone
    done = pipeline("promote", "tiny", "--rule", "alpha=0.4", cwd=tmp_path, **elsewhere)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ignored in the environment: MLFLOW_REGISTRY_URI, MLFLOW_RUN_ID; options alone choose" in done.stderr
    assert not (tmp_path / "other.db").exists()
    with find_model(tmp_path / "mlruns", None, None) as model:  # what predict takes
        assert model.what.startswith("the champion, image-classifier version 1")
    said = " ".join(done.stdout.split())
    assert f"its best trial, run {trained.finished}; one seed can't tell the best from the lucky" in said
    assert "against the constant answer, on the test split" in said and "at most 0.4" in said
    assert f"champion: image-classifier version 1, run {trained.finished}" in said
    again = pipeline("promote", "--run", trained.finished, cwd=tmp_path)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    shown = pipeline("history", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    kinds = [line.split("  ")[1].strip() for line in shown.stdout.splitlines()[:-1]]
    assert kinds == ["test evaluation", "passed", "begun", "promoted"]
    assert shown.stdout.splitlines()[-1].endswith("models that were tried on a test split: 1")
    back = pipeline("rollback", "--reason", "why not", cwd=tmp_path)
    assert back.returncode == 2
    assert back.stderr == "error: image-classifier: its champion is the first; there is nothing to go back to\n"


# ------------------------------------------------------------------------------------------------------------- make


def test_make_promote_rollback_and_history_pass_every_variable_on(made: Path) -> None:
    words = [
        "MODEL=m",
        "DATASET=d",
        "DATA_DIR=my data",
        "RULES=alpha=0.01 size_factor=9",
        "REASON=it's better",
        "TRACKING_URI=u",
    ]
    got = re.findall(r"\[(.*)\]", make(made, "promote", "NAME=attention", "FORCE=1", *words, REASON="exported").stdout)
    options = [
        "--model=m",
        "--dataset=d",
        "--data-dir=my data",
        "--rule=alpha=0.01 size_factor=9",
        "--reason=it's better",
    ]
    assert got == ["-m", "pipeline", "promote", *options, "--tracking-uri=u", "--force", "--", "attention"]
    run = re.findall(r"\[(.*)\]", make(made, "promote", "RUN=abc", "FORCE=0").stdout)
    assert run == ["-m", "pipeline", "promote", "--run=abc"]
    assert "which model?" in make(made, "promote").stderr
    back = re.findall(r"\[(.*)\]", make(made, "rollback", "REASON=too slow", "VERSION=3", "MODEL=m").stdout)
    assert back == ["-m", "pipeline", "rollback", "--reason=too slow", "--version=3", "--model=m"]
    assert "say why" in make(made, "rollback").stderr
    assert re.findall(r"\[(.*)\]", make(made, "history", "MODEL=m").stdout) == [
        "-m",
        "pipeline",
        "history",
        "--model=m",
    ]


def test_make_predict_passes_every_variable_on(made: Path) -> None:
    words = ["MODEL=models:/x@y", "METHOD=tta", "OUTPUT=my out.csv", "DEVICE=cpu", "TRACKING_URI=u"]
    done = make(made, "predict", "IMAGE=my cat's.png", "SHOW=1", *words, MODEL="exported")
    got = re.findall(r"\[(.*)\]", done.stdout)
    options = [
        "--model=models:/x@y",
        "--method=tta",
        "--output=my out.csv",
        "--device=cpu",
        "--tracking-uri=u",
        "--show",
    ]
    assert got == ["-m", "pipeline", "predict", *options, "--", "my cat's.png"]
    assert "--show" not in make(made, "predict", "IMAGE=a", "SHOW=0", MODEL="exported").stdout
    nothing = make(made, "predict")
    assert nothing.returncode == 2
    assert "which image? make predict IMAGE=cat.jpg" in nothing.stderr


def test_make_export_and_serve_pass_every_variable_on(made: Path) -> None:
    words = ["OUTPUT=my model", "DATASET=my pets", "DATA_DIR=my data", "TRACKING_URI=u"]
    got = re.findall(r"\[(.*)\]", make(made, "export", "RUN=a b", "INT8=1", *words, MODEL="exported").stdout)
    options = ["--output=my model", "--dataset=my pets", "--data-dir=my data", "--tracking-uri=u", "--int8"]
    assert got == ["-m", "pipeline", "export", *options, "--", "a b"]
    assert re.findall(r"\[(.*)\]", make(made, "export", "INT8=0").stdout) == ["-m", "pipeline", "export"]
    got = re.findall(r"\[(.*)\]", make(made, "serve", "MODEL=models:/x@y", "PORT=5", "TRACKING_URI=u").stdout)
    assert got == ["-m", "pipeline", "serve", "--port=5", "--tracking-uri=u", "--", "models:/x@y"]


def test_make_plan_passes_the_options_that_matter_on(made: Path) -> None:
    names = ["TRIALS", "EPOCHS", "DATASET", "DATA_DIR", "DEVICE", "SEED", "VERSION", "SET", "WORKERS"]
    done = make(made, "plan", "NAME=attention", *(f"{name}={name.lower()} value" for name in names), "TIMEOUT=1")
    expected = [f"--{name.lower().replace('_', '-')}={name.lower()} value" for name in names]
    assert re.findall(r"\[(.*)\]", done.stdout) == ["-m", "pipeline", "plan", *expected, "--", "attention"]
    assert "which study? make plan NAME=attention" in make(made, "plan").stderr


def test_make_compare_passes_every_variable_on(made: Path) -> None:
    words = ["OUTPUT=my page.html", "DATASET=my pets", "DATA_DIR=my data", "TRACKING_URI=u"]
    got = re.findall(r"\[(.*)\]", make(made, "compare", "NAME=attention baseline", *words, OUTPUT="exported").stdout)
    options = ["--output=my page.html", "--dataset=my pets", "--data-dir=my data", "--tracking-uri=u"]
    assert got == ["-m", "pipeline", "compare", *options, "--", "attention baseline"]
    assert "which study? make compare NAME=attention" in make(made, "compare").stderr


def test_make_bench_passes_every_variable_on(made: Path) -> None:
    words = ["MODEL=plain", "DATASET=digits", "DATA_DIR=my data", "DEVICE=cpu", "AGAINST=a peer.py"]
    got = re.findall(r"\[(.*)\]", make(made, "bench", *words, "JSON=1", AGAINST="exported").stdout)
    options = ["--model=plain", "--dataset=digits", "--data-dir=my data", "--device=cpu", "--against=a peer.py"]
    assert got == ["-m", "pipeline", "bench", *options, "--json"]
    assert re.findall(r"\[(.*)\]", make(made, "bench", "JSON=0").stdout) == ["-m", "pipeline", "bench"]


def test_make_finals_and_reproduce_pass_every_variable_on(made: Path) -> None:
    names = ["TOP", "SEEDS", "EPOCHS", "DATASET", "DATA_DIR", "DEVICE", "TRACKING_URI"]
    done = make(made, "finals", "NAME=attention", *(f"{name}={name.lower()} value" for name in names))
    expected = [f"--{name.lower().replace('_', '-')}={name.lower()} value" for name in names]
    assert re.findall(r"\[(.*)\]", done.stdout) == ["-m", "pipeline", "finals", *expected, "--", "attention"]
    assert "which study? make finals NAME=attention" in make(made, "finals").stderr
    names = ["DATASET", "DATA_DIR", "DEVICE", "TOLERANCE", "TRACKING_URI"]
    done = make(made, "reproduce", "RUN=0123", *(f"{name}={name.lower()} value" for name in names), RUN="exported")
    expected = [f"--{name.lower().replace('_', '-')}={name.lower()} value" for name in names]
    assert re.findall(r"\[(.*)\]", done.stdout) == ["-m", "pipeline", "reproduce", *expected, "--", "0123"]
    assert "which run? make reproduce RUN=" in make(made, "reproduce", RUN="exported").stderr


def test_make_bench_gpu_passes_every_variable_on(made: Path) -> None:
    words = ["PEER=a peer.py", "AIRBENCH=a.py", "DATA_DIR=my data", "OUTPUT=my out.json", "ONLY=at once,fast"]
    got = re.findall(r"\[(.*)\]", make(made, "bench-gpu", *words).stdout)
    options = [
        "--peer=a peer.py",
        "--airbench=a.py",
        "--data-dir=my data",
        "--output=my out.json",
        "--only=at once,fast",
    ]
    assert got == ["-m", "pipeline", "bench-gpu", *options]


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


def test_a_set_up_that_fails_says_what_it_needs_and_is_not_taken_for_done(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    (folder / ".venv" / "ready").unlink()
    python = folder / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\ntest "$2" != pip\n')
    done = make(folder, "setup", f"PYTHON={python}")
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "not everything could be installed" in line
    assert re.search(r"10 GB of disk.*free here: [\d.]+[KMGT]", line)
    assert not (folder / ".venv" / "ready").exists()


def test_make_study_passes_every_variable_on(made: Path) -> None:
    names = ["TRIALS", "EPOCHS", "TIMEOUT", "DATASET", "DATA_DIR", "DEVICE", "SEED", "VERSION", "STORAGE"]
    words = [f"{name}={name.lower()} value" for name in [*names, "TRACKING_URI", "SET", "WORKERS", "HANG"]]
    done = make(made, "study", "NAME=attention", *words)
    got = re.findall(r"\[(.*)\]", done.stdout)
    expected = [
        f"--{name.lower().replace('_', '-')}={name.lower()} value"
        for name in [*names, "TRACKING_URI", "SET", "WORKERS", "HANG"]
    ]
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
