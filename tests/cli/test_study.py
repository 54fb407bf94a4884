"""The command `study`, in a process of its own as a user runs it."""

import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import NO_RETRIES, TINY_NETWORK, run_forked, run_pipeline
from fork_server import Process, shared_fork_server
from PIL import Image

from cli.helpers import assert_refused, rows
from pipeline.cli import study as module
from pipeline.cli.common import make_console
from pipeline.cli.options import StudyOptions
from pipeline.search import budget
from pipeline.search.local_pool import LocalPool
from pipeline.sections.data import Data
from pipeline.tracking import queries
from pipeline.tracking.tracker import MlflowTracker

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


@pytest.mark.parametrize(
    ("typed", "workers", "expected"),
    [
        ({"device": "cpu"}, 1, None),
        ({"device": "cpu", "stall_timeout": "60s"}, 1, 1),
        ({"device": "cpu"}, 2, 2),
        ({"device": "cuda"}, 1, 1),
        ({"device": "cuda"}, 2, 2),
    ],
)
def test_a_gpu_is_left_to_another_process(
    typed: dict[str, str], workers: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What crashes there ends a worker, and not the study."""
    monkeypatch.setattr(module, "find_device", torch.device)
    options = StudyOptions.model_validate(typed)
    with module._worker_pool(make_console(), options, workers, Path("data")) as pool:
        found = (pool.workers, pool.device) if isinstance(pool, LocalPool) else pool
    assert found == (None if expected is None else (expected, torch.device(typed["device"])))


def test_study_runs_resumes_and_names_the_next_commands(tmp_path: Path) -> None:
    study = ("study", "attention", "--dataset", "digits", "--epochs", "1", "--set", TINY_NETWORK)
    first = run_pipeline(*study, "--trials", "2", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "1,294 training and 144 validation images of 10 classes" in first.stdout
    assert "trial 0: the control, the base recipe" in first.stdout
    assert re.search(r"epoch 1/1: \d+ images/s, loss \d\.\d+ train \d\.\d+ val, accuracy 0\.\d+", first.stdout)
    assert "attention-v1-digits: best 2 of 2 trials, validation split" in first.stdout
    for link in (
        "python -m pipeline ui",
        "#/experiments/1/runs?workflowType=machine_learning&viewStateShareKey=",
        "#/compare-runs?runs=",
    ):
        assert link in first.stdout
    for command in ("compare", "finals", "promote"):
        assert f"  python -m pipeline {command} attention-v1-digits\n" in first.stdout, "what comes next"
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

    more = run_forked(*study, "--trials", "3", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    assert "attention-v1-digits: 2 of 3 trials" in more.stdout
    assert "trial 0:" not in more.stdout.split("best")[0]
    assert len(rows(runs / "optuna.db", "select number from trials")) == 3

    other = run_forked(*study[:5], "2", *study[6:], "--trials", "3", cwd=tmp_path)
    assert other.returncode == 2
    assert "  base training.epochs: 1 then, 2 now" in other.stderr
    assert "--version 2" in other.stderr or "VERSION=2" in other.stderr

    new = run_forked(*study, "--trials", "1", "--version", "2", "--budget", "1h", cwd=tmp_path)
    assert new.returncode == 0, new.stderr
    assert "a budget of 1 h 00 min: 1 trial of 1 epoch (" in new.stdout
    assert "then finals of the best 3 and the control with 5 seeds (" in new.stdout
    assert "attention-v2-digits: 1 of 1 trials" in new.stdout
    assert "winner: trial 0 (control) of attention-v2-digits" in new.stdout
    assert "  python -m pipeline promote attention-v2-digits\n" in new.stdout


def _trains(words: list[str], folder: Path, log: Path) -> Process:
    """The command, once it has trained an epoch."""
    process, limit = shared_fork_server().start(words, folder, log), time.monotonic() + 120
    while not re.search(r"epoch \d+/400:", log.read_text()):
        assert process.code() is None and time.monotonic() < limit, log.read_text()
        time.sleep(0.1)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_study_leaves_nothing_running_and_resumes(number: signal.Signals, tmp_path: Path) -> None:
    words = ["study", "attention", "--dataset", "digits", "--epochs", "400", "--trials", "1", "--set", TINY_NETWORK]
    log = tmp_path / "log"
    process = _trains(words, tmp_path, log)
    process.signal(number)
    assert process.wait(30) == (130 if number == signal.SIGTERM else -number)
    runs = tmp_path / "mlruns"
    if number == signal.SIGTERM:
        assert "interrupted; the same command resumes" in log.read_text()
        assert rows(runs / "optuna.db", "select count(*) from trials where state = 'RUNNING'") == [(0,)]
        assert rows(runs / "mlflow.db", "select distinct status from runs") == [("KILLED",)]
    else:
        assert rows(runs / "optuna.db", "select count(*) from trials where state = 'RUNNING'") == [(1,)]

    # The interrupted trial is asked again by the resumed study; stop it once it is seen to be under way.
    log.unlink()
    resumed = _trains(words, tmp_path, log)
    resumed.signal(signal.SIGTERM)
    assert resumed.wait(30) == 130
    assert "trial 1: the control, the base recipe" in log.read_text()
    assert rows(runs / "optuna.db", "select count(*) from trials where state = 'RUNNING'") == [(0,)]
    assert rows(runs / "mlflow.db", "select count(*) from runs where status = 'RUNNING'") == [(0,)]


def test_study_on_all_of_cifar10(tmp_path: Path, cifar10_dir: Path) -> None:
    tiny = f"{TINY_NETWORK} training.batch_size=1000"
    words = ("study", "attention", "--data-dir", str(cifar10_dir), "--trials", "1", "--epochs", "1", "--set", tiny)
    done = run_forked(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "45,000 training and 5,000 validation images of 10 classes" in done.stdout
    keys = {key for (key,) in rows(tmp_path / "mlruns" / "mlflow.db", "select distinct key from metrics")}
    assert {f"val/f1/{name}" for name in ("airplane", "cat", "truck")} <= keys


def test_study_on_a_folder_of_images(tmp_path: Path, cifar10_dir: Path) -> None:
    from pipeline.data.datasets import load

    whole = load(Data(dataset="cifar10", image_size=32), cifar10_dir)
    for label, name in ((3, "cat [tabby]"), (5, "dög")):
        folder = tmp_path / "pets" / "train" / name
        folder.mkdir(parents=True)
        for i in np.flatnonzero(whole.train.labels.numpy() == label)[:60]:
            Image.fromarray(whole.train.images[i].permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    words = ("study", "attention", "--dataset", "pets", "--trials", "1", "--epochs", "1")
    done = run_forked(*words, "--set", TINY_NETWORK.replace("image_size=8", "image_size=24"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search("attention-v1-pets-[0-9a-f]{6} on", done.stdout)
    keys = {key for (key,) in rows(tmp_path / "mlruns" / "mlflow.db", "select distinct key from metrics")}
    assert "val/f1/cat _tabby_" in keys

    (tmp_path / "pets" / "train" / "dög" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    (tmp_path / "pets" / "train" / "dög" / "empty.jpg").touch()
    before = rows(tmp_path / "mlruns" / "optuna.db", "select count(*) from trials")
    refused = run_forked(*words, cwd=tmp_path)
    assert refused.returncode == 3
    assert "broken.png" in refused.stderr
    assert "empty.jpg" in refused.stderr
    assert rows(tmp_path / "mlruns" / "optuna.db", "select count(*) from trials") == before


def test_finals_find_a_folder_that_moved(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number in np.flatnonzero(digits.target < 2)[:24]:
        folder = tmp_path / "digits" / "train" / str(digits.target[number])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[number] * 15).astype(np.uint8)).save(folder / f"{number}.png")
    words = (
        "--epochs",
        "1",
        "--trials",
        "1",
        "--set",
        TINY_NETWORK.replace("image_size=8", "image_size=16") + " training.batch_size=8",
    )
    (tmp_path / "digits" / "train" / "0" / "empty.png").touch()
    done = run_forked("study", "attention", "--dataset", "./digits", "--corrupt", "skip", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search("attention-v1-digits-[0-9a-f]{6} on", done.stdout), (
        "not the study of the digits that need no folder"
    )
    assert "caution: 2 validation images say little" in done.stdout
    assert "images that aren't used: 1 that can't be read, 0 that are in the test split, too; " in done.stdout
    (excluded,) = (tmp_path / "mlruns").glob("artifacts/*/artifacts/excluded.csv")
    assert excluded.read_text() == "path,reason\ntrain/0/empty.png,empty file\n"
    moved = (tmp_path / "digits").rename(tmp_path / "zeros and ones")
    refused = run_forked("promote", "attention", cwd=tmp_path)
    assert refused.returncode == 3
    assert f"is not in {tmp_path / 'digits'}" in refused.stderr
    finals = ("finals", "attention-v1-digits", "--top", "1", "--seeds", "1", "--dataset", moved.name)
    done = run_pipeline(*finals, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "caution: 2 validation images say little" in done.stdout
    [study] = queries.studies(MlflowTracker(tmp_path / "mlruns"))
    assert list(study.places) == [str(moved), str(tmp_path / "digits")], "where it is found without the option"


def test_cifar10_that_cannot_be_downloaded_is_one_message(tmp_path: Path) -> None:
    closed = "http://127.0.0.1:9"
    done = run_forked("study", "attention", cwd=tmp_path, http_proxy=closed, https_proxy=closed, no_proxy="")
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert f"not in {tmp_path / 'data' / 'cifar-10-batches-py'}" in done.stderr
    assert f"failed (through http_proxy={closed} https_proxy={closed}): " in done.stderr
    assert "digits" in done.stderr
    left = [file for file in tmp_path.rglob("*") if file.is_file() and file.parent.name != "mlruns"]
    assert not left
    assert not (tmp_path / "mlruns" / "optuna.db").exists()


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (
            ["study"],
            ["NAME: needs a value: a module of studies/", "type `python -m pipeline study NAME`; studies: attention"],
        ),
        (
            ["study", "atention"],
            ["error: no study atention", "(did you mean attention?)", "attention, attention_kinds, "],
        ),
        (["study", "../attention"], ["'../attention'", "must be lower-case letters"]),
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
            [
                "`--trials 0`: ",
                "`--epochs x`: ",
                "`--timeout -1`: ",
                "`--seed -1`: ",
                "`--device gpu`: should be auto, cpu, cuda",
            ],
        ),
        (
            [
                "study",
                "attention",
                "--set",
                "optimizer.lr=-1 training.epoch=0 loss=3",
                "--set",
                "lr",
                "--trials",
                "0",
                "--storage",
                "sqlite:///mlruns/mlflow.db",
            ],
            [
                "loss: no such field",
                "`--set lr`: should be FIELD=VALUE",
                "optimizer.lr = -1:",
                "`--trials 0`:",
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
        (
            ["study", "attention", "--workers", "0", "--stall-timeout", "soon"],
            ["`--workers 0`:", "`--stall-timeout soon`:"],
        ),
        (["study", "attention", "--storage", "sqlite://"], ["`--storage sqlite://`: keeps nothing"]),
        (["study", "attention", "--device", "cuda:" + "9" * 30], ["should be auto, cpu, cuda or cuda:N"]),
        (["study", "attention", "--dataset", "cifar100"], ["data.dataset = cifar100:"]),
        (["study", "baseline", "--data-dir", "dta"], ["`--data-dir dta`: there is no such folder; name the folder"]),
        (["study", "attention", "--device", "cuda:99"], ["`--device cuda:99`: torch sees"]),
        (
            ["study", "attention", "--device", "cpu", "--set", "training.execution=graphed"],
            ["training.execution = graphed", "a graph needs a GPU, and this is cpu", "training.execution=eager"],
        ),
        (
            ["study", "attention", "--epochs", "2", "--set", "training.epochs=3 optimizer.lr=1 optimizer.lr=2"],
            [
                "`--set training.epochs=3`: was set to 2 already; choose one",
                "`--set optimizer.lr=2`: was set to 1 already",
            ],
        ),
    ],
)
def test_bad_input_is_refused(words: list[str], lines: list[str], tmp_path: Path) -> None:
    assert_refused(words, lines, tmp_path)


def test_unreachable_store_is_reported_before_any_download(tmp_path: Path) -> None:
    for option, uri in (("--tracking-uri", "http://127.0.0.1:9"), ("--storage", "postgresql://127.0.0.1:9/x")):
        done = run_forked("study", "attention", option, uri, cwd=tmp_path)
        assert done.returncode == 2, done.stdout + done.stderr
        assert uri.partition("//")[2] in done.stderr
        assert "download" not in done.stderr


def test_finished_study_only_lacks_its_links_when_the_server_goes_away(
    fading_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.cli import study
    from pipeline.cli.common import make_console

    for name, value in NO_RETRIES.items():
        monkeypatch.setenv(name, value)
    tracker = MlflowTracker(tmp_path / "mlruns", fading_server)
    assert study._links(make_console(), tracker, "attention") == {}
    assert f"no links: MLflow does not answer any more (API request to {fading_server}/" in capsys.readouterr().out
    with pytest.raises(AttributeError):  # a bug isn't hidden
        study._links(make_console(), SimpleNamespace(), "attention")


@pytest.mark.parametrize(
    ("unsent", "line"), [(set(), "no time is left for finals"), ({"a" * 32}, "no finals, as MLflow lacks trials")]
)
def test_a_deleted_run_does_not_keep_a_budget_from_its_finals(
    unsent: set[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(queries, "find_studies", lambda tracker, name: [None])
    monkeypatch.setattr(budget, "finals_in_time", lambda *arguments: None)
    tracker, done = SimpleNamespace(pending=["a" * 32], unsent=unsent), SimpleNamespace(study_name="one")
    nothing: Any = None
    module._run_finals(make_console(), nothing, done, nothing, torch.device("cpu"), cast(MlflowTracker, tracker))
    assert line in capsys.readouterr().out
