"""Stores that the tests of tracking share, whole and failing ones, and what MLflow has of a run."""

import json
import multiprocessing
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import ViewType
from proxy import Proxy

from pipeline.data.prepare import TrainingData
from pipeline.recipe import Recipe
from pipeline.tracking import uploader
from pipeline.tracking.journal import RECORDS
from pipeline.tracking.run import MlflowRun
from pipeline.tracking.server import HOST, start_server, stop_server
from pipeline.tracking.tags import State, StoredRun
from pipeline.tracking.tracker import MlflowTracker, RunRequest

# What a process that is to log imports, for the server of forks of multiprocessing.
PRELOADED = ["pipeline.experiment", "mlflow.store.tracking.sqlalchemy_store"]
KEY = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def sqlite_tracker(tmp_path_factory: pytest.TempPathFactory) -> MlflowTracker:
    """A store in SQLite that a file's tests share, each with experiments of its own."""
    return MlflowTracker(tmp_path_factory.mktemp("store"))


@pytest.fixture
def fast_uploads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter intervals and timeouts."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr(uploader, "_INTERVAL_S", 0.2)
    monkeypatch.setattr(uploader, "_MAX_PAUSE_S", 0.5)


@pytest.fixture(scope="module")
def server_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an MLflow server."""
    home = tmp_path_factory.mktemp("server")
    port = free_port()
    running = start_server(MlflowTracker(home).uri, home, port)
    yield port
    stop_server(running)


@pytest.fixture
def proxy(server_port: int, fast_uploads: None) -> Proxy:
    """A proxy before the server, which can fail."""
    return Proxy(server_port)


@pytest.fixture
def proxied_tracker(proxy: Proxy, tmp_path: Path) -> MlflowTracker:
    """A client of the server behind the proxy."""
    return MlflowTracker(tmp_path / "mlruns", f"http://{HOST}:{proxy.port}")


@pytest.fixture
def local_tracker(tmp_path: Path, fast_uploads: None, trained: Any) -> MlflowTracker:
    """A store in SQLite of a test's own; a copy is faster than a new one."""
    trained.copy(tmp_path / "mlruns")
    return MlflowTracker(tmp_path / "mlruns")


def free_port() -> int:
    """A port where nobody listens."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def stored(tracker: MlflowTracker, run: MlflowRun | str) -> StoredRun:
    """What MLflow has of a run, when it has all that was measured so far."""
    assert tracker.flush(30)
    return tracker.client.get_run(run if isinstance(run, str) else str(run.id))


def trial_tags(study: str, trial: int) -> dict[str, str]:
    """The tags of a trial's run."""
    return {"role": "trial", "study": study, "trial": str(trial)}


def records(folder: Path) -> list[dict[str, Any]]:
    """The records of a journal."""
    return [json.loads(line) for line in (folder / RECORDS).read_text().splitlines()]


def runs_of(tracker: MlflowTracker, key: str, kind: int = ViewType.ACTIVE_ONLY) -> list[StoredRun]:
    """All runs with this key."""
    experiments = [experiment.experiment_id for experiment in tracker.client.search_experiments()]
    return list(tracker.client.search_runs(experiments, f"tags.run_key = '{key}'", kind))


def points(tracker: MlflowTracker, run_id: str, name: str) -> list[tuple[int, float]]:
    """Step and value of a metric's points."""
    return sorted((point.step, point.value) for point in tracker.client.get_metric_history(run_id, name))


def run_and_die(
    home: Path, recipe: Recipe, data: TrainingData, key: str, epochs: int, state: State | None, send: bool
) -> None:
    """In another process: measure so many epochs, and be killed; with `send`, when MLflow has them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_die, args=(home, recipe, data, key, epochs, state, send))
    process.start()
    process.join(60)
    assert process.exitcode == -9


def _die(
    home: Path, recipe: Recipe, data: TrainingData, key: str, epochs: int, state: State | None, send: bool
) -> None:
    uploader._INTERVAL_S = 0.1
    tracker = MlflowTracker(home)
    if not send:
        tracker.uploader._work = lambda: None  # type: ignore[method-assign]
    with tracker.run(RunRequest(name="train", recipe=recipe, data=data, run_key=key)) as run:
        for epoch in range(1, epochs + 1):
            run.log_metrics({"val/accuracy": epoch / 10}, epoch)
        if state:
            run.end(state)
        if send:
            assert tracker.flush(30)
        os.kill(os.getpid(), 9)
