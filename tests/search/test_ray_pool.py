"""Workers as Ray actors, on a real Ray of this machine; skipped where Ray isn't installed."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from optuna.trial import TrialState
from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.search import ray_pool, run_study
from pipeline.search.ray_pool import RayPool, connect
from pipeline.search.storage import num_finished, open_storage
from pipeline.search.study import Search, Study
from pipeline.search.worker import Assignment, Limits
from pipeline.tracking.tracker import MlflowTracker

# Not by importing it: how to authenticate is fixed then.
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray isn't installed")
SERVERS = ("--storage", "postgresql://me@127.0.0.1:9/optuna", "--tracking-uri", "http://127.0.0.1:9")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """No token and no cluster but what a test makes."""
    # pytest's folders are too long for the paths of Ray's sockets, which end at 107 bytes.
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as ray,
    ):
        patch.setenv("HOME", str(tmp_path_factory.mktemp("user")))
        patch.setenv("RAY_TMPDIR", ray)
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
            patch.delenv(name, raising=False)
        yield patch


@pytest.fixture(scope="module")
def ray_here(alone: pytest.MonkeyPatch) -> Iterator[RayPool]:
    with connect("auto", "auto", Path("data"), 2, Limits(beat_s=0.5)) as found:
        yield found


class Killer:
    """An Observer that kills the worker of the first trial it sees at an epoch."""

    def __init__(self, study: Any):
        self._study, self.killed = study, threading.Event()

    def epoch(self, number: int, report: Any) -> None:
        owner = self._study().trials[number].user_attrs["worker"]
        if not self.killed.is_set():
            os.kill(owner["pid"], signal.SIGKILL)
            self.killed.set()

    def __getattr__(self, name: str) -> Any:
        return lambda *what: None


def rates(trial: Any) -> None:
    trial.suggest_float("optimizer.lr", 1e-3, 1, log=True)


@needs_ray
def test_actors_run_a_study_and_one_that_is_killed_costs_no_trial(
    ray_here: RayPool, tmp_path: Path, small_recipe: Recipe, digits: TrainingData
) -> None:
    import optuna

    home = tmp_path / "mlruns"
    storage, tracker = open_storage(home), MlflowTracker(home)
    base = small_recipe.changed({"training.epochs": 4})
    study = Study(question="?", base=base, space=rates, objective="val/accuracy", trials=4)
    search = Search("lab", study, {}, version=1, trials=4, timeout_s=None)
    killer = Killer(lambda: optuna.load_study(study_name="lab-v1-digits", storage=storage))
    watch: Any = killer
    done = run_study.run_study(search, digits, torch.device("cpu"), watch, storage, tracker, home, crew=ray_here)

    assert killer.killed.is_set()
    assert num_finished(done) == 4
    again = [trial for trial in done.trials if trial.user_attrs.get("asked_again")]
    assert [trial.state for trial in again] == [TrialState.FAIL]
    retries = [trial for trial in done.trials if trial.user_attrs.get("retry_of") == again[0].number]
    assert [trial.user_attrs["deaths"] for trial in retries] == [1]
    assert len(done.trials) == 5
    pids = {trial.user_attrs["worker"]["pid"] for trial in done.trials}
    assert os.getpid() not in pids
    assert len(pids) >= 2, "two at once, or another after the killed one"
    experiment = tracker.experiment("lab-v1-digits")
    runs = tracker.client.search_runs([experiment], "tags.role = 'trial'")
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    assert {int(run.data.tags["trial"]) for run in runs} >= {t.number for t in done.trials} - {again[0].number}


@needs_ray
def test_that_the_cluster_has_no_place_is_told_once(
    ray_here: RayPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    import ray

    class Other:
        def is_here(self) -> bool:
            return True

    monkeypatch.setattr(ray_pool, "PLACED_S", 0)
    monkeypatch.setattr(ray_pool, "LOOK_S", 0)
    caplog.set_level("INFO", "pipeline")
    other: Any = ray.remote(Other).options(num_cpus=ray.cluster_resources()["CPU"]).remote()
    assert ray.get(other.is_here.remote(), timeout=30), "the actors of the studies before are gone"
    crew = RayPool("here", "cpu", tmp_path, 1)
    late = crew.start(
        Assignment(search=b"", storage="", tracking_uri="", home=tmp_path, data_dir=tmp_path, parent=""), 0
    )
    try:
        assert late.ended() is None
        crew.room()
        crew.room()
        assert [record.getMessage() for record in caplog.records] == [
            "1 of 1 workers wait for a place: others are at work on the cluster"
        ]
    finally:
        late.kill()
        ray.kill(other)
    crew.room()
    assert len(caplog.records) == 1


@needs_ray
def test_a_stranger_without_the_token_or_with_another_is_kept_out(ray_here: RayPool, alone: pytest.MonkeyPatch) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    token = Path.home() / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert ray_pool._joined(address) == address
    with alone.context() as other:
        other.setenv("RAY_AUTH_TOKEN", "f" * 64)
        with pytest.raises(UserError, match="has another token than this one"):
            ray_pool._joined(address)
    with alone.context() as none:
        none.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere/token")
        with pytest.raises(UserError, match="asks for a token, and there is none here"):
            ray_pool._joined(address)


@needs_ray
def test_a_ray_of_our_own_listens_on_this_machine_only(ray_here: RayPool) -> None:
    processes = [process for process in psutil.Process().children(recursive=True) if process.study_is_running()]
    ports = [
        connection.laddr
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(ports) >= 3
    assert {port.ip.removeprefix("::ffff:") for port in ports} == {"127.0.0.1"}


@needs_ray
def test_an_address_where_nobody_answers_is_told_in_one_line(alone: pytest.MonkeyPatch) -> None:
    alone.setattr(ray_pool, "KNOCK_S", 2.0)
    with pytest.raises(UserError, match=r"^CLUSTER 127\.0\.0\.1:9: no answer; ") as caught:
        ray_pool._joined("127.0.0.1:9")
    assert len(caught.value.lines) == 1


def test_without_ray_the_command_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError) as caught, connect("auto", "cpu", Path("data"), None, Limits()):
        pass
    assert caught.value.lines == ["CLUSTER auto: needs Ray; .venv/bin/pip install -e '.[cluster]'"]


def test_what_a_cluster_lacks_is_told_in_a_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = ["study", "attention", "--dataset", "digits"]

    def lines(*words: str) -> list[str]:
        result = CliRunner().invoke(app, [*study, *words])
        assert isinstance(result.exception, UserError)
        return result.exception.lines

    first = lines("--cluster", "auto", "--device", "cuda:1")
    assert [line.split(":")[0] for line in first] == ["STORAGE", "TRACKING_URI", "DEVICE cuda"]
    assert "an SQLite file is for one machine" in first[0]
    second = lines("--cluster", "ray://nobody", *SERVERS)
    assert second == ["CLUSTER = ray://nobody: should be auto, HOST:PORT or ray://HOST:PORT"]
    assert not (tmp_path / "mlruns").exists()


def node(cpus: int = 0, gpus: int = 0) -> dict[str, Any]:
    return {"Alive": True, "Resources": {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})}


class Started:
    """In the place of an actor: what it was given."""

    def __init__(self, assignment: Assignment, resources: Any):
        self.assignment, self.resources = assignment, resources


def test_there_is_room_for_as_many_as_the_nodes_that_are_there_and_never_for_more_than_were_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = [node(cpus=2)]
    monkeypatch.setattr(ray_pool, "_nodes", lambda: nodes)
    monkeypatch.setattr(ray_pool, "LOOK_S", -1.0)
    every, three = (RayPool("here", "cpu", Path("data"), workers) for workers in (None, 3))
    assert (every.room(), three.room()) == (2, 2)
    nodes.append(node(cpus=4))
    assert (every.room(), three.room()) == (6, 3)
    nodes.pop(0)
    assert (every.room(), three.room()) == (4, 3)


@pytest.mark.parametrize(("workers", "share", "fraction", "room"), [(None, 1.0, None, 2), (6, 0.3333, 1 / 3, 6)])
def test_gpus_are_shared_out_among_the_workers(
    workers: int | None, share: float, fraction: float | None, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pool, "_nodes", lambda: [node(cpus=8), node(cpus=8, gpus=2)])
    monkeypatch.setattr(ray_pool, "RayWorker", Started)
    crew = RayPool("here", "cuda", Path("data"), workers)
    assert crew.room() == room
    place = {"home": Path("mlruns"), "data_dir": Path("data")}
    started: Any = crew.start(Assignment(search=b"", storage="", tracking_uri="", parent="", **place), 0)
    assert started.resources == {"num_gpus": share, "num_cpus": 0}
    assert started.assignment.device == "cuda:0"
    assert started.assignment.memory_fraction == fraction


@pytest.mark.chaos
@needs_ray
def test_a_cluster_that_asks_for_no_token_is_refused(alone: pytest.MonkeyPatch) -> None:
    code = "import ray, time; print(ray.init(include_dashboard=False).address_info['gcs_address'], flush=True); time.sleep(99)"
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    open_one = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert open_one.stdout
        address = open_one.stdout.readline().strip()
        with pytest.raises(UserError, match="asks for no token, so whoever reaches it can run anything on it"):
            ray_pool._joined(address)
    finally:
        open_one.terminate()
        open_one.wait()
