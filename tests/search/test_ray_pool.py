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
from optuna.trial import TrialState
from study_harness import RecordingObserver, StudyHarness, attributes_of
from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.errors import UserError
from pipeline.search import ray_pool
from pipeline.search.ray_pool import RayPool, connect
from pipeline.search.stored_study import num_finished
from pipeline.search.trial_attributes import TrialAttributes
from pipeline.search.worker import Assignment, Limits
from pipeline.training.loop import EpochReport
from pipeline.training.placement import Placement

# Not by importing it: how to authenticate is fixed then.
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray isn't installed")
SERVERS = ("--storage", "postgresql://me@127.0.0.1:9/optuna", "--tracking-uri", "http://127.0.0.1:9")


@pytest.fixture(scope="module")
def no_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
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
def ray_here(no_cluster: pytest.MonkeyPatch) -> Iterator[RayPool]:
    with connect("auto", "auto", Path("data"), 2, Limits(heartbeat_s=0.5)) as pool:
        yield pool


@needs_ray
def test_study_on_a_cluster_survives_a_killed_actor(ray_here: RayPool, harness: StudyHarness) -> None:
    killed = threading.Event()

    def kill_first(number: int, report: EpochReport) -> None:
        owner = TrialAttributes.of(harness.trials()[number]).worker
        if not killed.is_set():
            os.kill(owner["pid"], signal.SIGKILL)
            killed.set()

    observer = RecordingObserver(at_epoch=kill_first)
    done = harness.run(4, changes={"training.epochs": 4}, observer=observer, pool=ray_here)

    assert killed.is_set()
    assert num_finished(done) == 4
    requeued = [trial for trial in done.trials if TrialAttributes.of(trial).requeued]
    assert [trial.state for trial in requeued] == [TrialState.FAIL]
    retries = [a for a in attributes_of(done.trials) if a.retry_of == requeued[0].number]
    assert [attributes.deaths for attributes in retries] == [1]
    assert len(done.trials) == 5
    pids = {attributes.worker["pid"] for attributes in attributes_of(done.trials)}
    assert os.getpid() not in pids
    assert len(pids) >= 2, "two at once, or another after the killed one"
    runs = harness.runs()
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    assert {int(run.data.tags["trial"]) for run in runs} >= {t.number for t in done.trials} - {requeued[0].number}


@needs_ray
def test_pending_actors_are_reported_once(
    ray_here: RayPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    import ray

    class Other:
        def is_here(self) -> bool:
            return True

    monkeypatch.setattr(ray_pool, "PLACEMENT_S", 0)
    monkeypatch.setattr(ray_pool, "CAPACITY_S", 0)
    caplog.set_level("INFO", "pipeline")
    other: Any = ray.remote(Other).options(num_cpus=ray.cluster_resources()["CPU"]).remote()
    assert ray.get(other.is_here.remote(), timeout=30), "the actors of the studies before are gone"
    pool = RayPool("here", "cpu", tmp_path, 1)
    late = pool.start(
        Assignment(search=b"", storage="", tracking_uri="", home=tmp_path, data_dir=tmp_path, parent_run=""), 0
    )
    try:
        assert late.ended() is None
        pool.capacity()
        pool.capacity()
        assert [record.getMessage() for record in caplog.records] == [
            "1 of 1 workers are pending: the cluster is in use"
        ]
    finally:
        late.kill()
        ray.kill(other)
    pool.capacity()
    assert len(caplog.records) == 1


@needs_ray
def test_client_without_the_token_is_refused(ray_here: RayPool, no_cluster: pytest.MonkeyPatch) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    token = Path.home() / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert ray_pool._probe(address) == address
    with no_cluster.context() as other:
        other.setenv("RAY_AUTH_TOKEN", "f" * 64)
        with pytest.raises(UserError, match="has another token than this machine"):
            ray_pool._probe(address)
    with no_cluster.context() as none:
        none.setenv("RAY_AUTH_TOKEN_PATH", "/nowhere/token")
        with pytest.raises(UserError, match="requires a token, and there is none here"):
            ray_pool._probe(address)


@needs_ray
def test_own_cluster_listens_on_this_machine_only(ray_here: RayPool) -> None:
    processes = [process for process in psutil.Process().children(recursive=True) if process.is_running()]
    ports = [
        connection.laddr
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(ports) >= 3
    assert {port.ip.removeprefix("::ffff:") for port in ports} == {"127.0.0.1"}


@needs_ray
def test_address_without_answer_is_one_line(no_cluster: pytest.MonkeyPatch) -> None:
    no_cluster.setattr(ray_pool, "PROBE_S", 2.0)
    with pytest.raises(UserError, match=r"^`--cluster` 127\.0\.0\.1:9: no answer; ") as caught:
        ray_pool._probe("127.0.0.1:9")
    assert len(caught.value.lines) == 1


def test_missing_ray_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError) as caught, connect("auto", "cpu", Path("data"), None, Limits()):
        pass
    assert caught.value.lines == ["`--cluster` auto: needs Ray; .venv/bin/pip install -e '.[cluster]'"]


def test_options_that_a_cluster_lacks_are_all_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = ["study", "attention", "--dataset", "digits"]

    def lines(*words: str) -> list[str]:
        result = CliRunner().invoke(app, [*study, *words])
        assert isinstance(result.exception, UserError)
        return result.exception.lines

    first = lines("--cluster", "auto", "--device", "cuda:1")
    assert [line.split(":")[0] for line in first] == ["`--storage`", "`--tracking-uri`", "`--device cuda"]
    assert "an SQLite file is for one machine" in first[0]
    second = lines("--cluster", "ray://nobody", *SERVERS)
    assert second == ["`--cluster ray://nobody`: should be auto, HOST:PORT or ray://HOST:PORT"]
    assert not (tmp_path / "mlruns").exists()


def node(cpus: int = 0, gpus: int = 0) -> dict[str, Any]:
    return {"Alive": True, "Resources": {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})}


class Started:
    """In the place of an actor: what it was given."""

    def __init__(self, assignment: Assignment, resources: Any):
        self.assignment, self.resources = assignment, resources


def test_capacity_follows_the_nodes_up_to_the_workers_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = [node(cpus=2)]
    monkeypatch.setattr(ray_pool, "_nodes", lambda: nodes)
    monkeypatch.setattr(ray_pool, "CAPACITY_S", -1.0)
    unlimited, three = (RayPool("here", "cpu", Path("data"), workers) for workers in (None, 3))
    assert (unlimited.capacity(), three.capacity()) == (2, 2)
    nodes.append(node(cpus=4))
    assert (unlimited.capacity(), three.capacity()) == (6, 3)
    nodes.pop(0)
    assert (unlimited.capacity(), three.capacity()) == (4, 3)


@pytest.mark.parametrize(("workers", "share", "fraction", "capacity"), [(None, 1.0, None, 2), (6, 0.3333, 1 / 3, 6)])
def test_gpus_are_shared_among_the_workers(
    workers: int | None, share: float, fraction: float | None, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pool, "_nodes", lambda: [node(cpus=8), node(cpus=8, gpus=2)])
    monkeypatch.setattr(ray_pool, "RayWorker", Started)
    pool = RayPool("here", "cuda", Path("data"), workers)
    assert pool.capacity() == capacity
    place = {"home": Path("mlruns"), "data_dir": Path("data")}
    started: Any = pool.start(Assignment(search=b"", storage="", tracking_uri="", parent_run="", **place), 0)
    assert started.resources == {"num_gpus": share, "num_cpus": 0}
    assert started.assignment.placement == Placement("cuda:0", fraction)


@pytest.mark.chaos
@needs_ray
def test_cluster_without_a_token_is_refused(no_cluster: pytest.MonkeyPatch) -> None:
    code = "import ray, time; print(ray.init(include_dashboard=False).address_info['gcs_address'], flush=True); time.sleep(99)"
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    open_one = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert open_one.stdout
        address = open_one.stdout.readline().strip()
        with pytest.raises(UserError, match="requires no token, so anyone who reaches it can run anything on it"):
            ray_pool._probe(address)
    finally:
        open_one.terminate()
        open_one.wait()
