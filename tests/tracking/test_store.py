"""Who may open a store, and what of it can be tried again."""

import multiprocessing
import re
import signal
import socket
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from fork_server import shared_fork_server
from mlflow.exceptions import MlflowException
from mlflow.protos import databricks_pb2 as codes
from requests import ConnectionError
from sqlalchemy.exc import OperationalError
from tracking_stores import PRELOADED

from pipeline.errors import UserError
from pipeline.tracking import queries
from pipeline.tracking.journal import DiskFault
from pipeline.tracking.server import HOST
from pipeline.tracking.store import is_permanent
from pipeline.tracking.tags import State
from pipeline.tracking.tracker import MlflowTracker


def open_at_once(home: Path, batch_writes: Barrier, number: int, parents: Any) -> None:
    batch_writes.wait(60)
    tracker = MlflowTracker(home)
    batch_writes.wait(60)
    tracker.open_study("shared-v1-digits", "Why?", "val/accuracy", []).end(State.FINISHED)
    parents.put(tracker.store.experiment("shared-v1-digits"))
    tracker.open_study(f"own{number}-v1-digits", "Why?", "val/accuracy", []).end(State.FINISHED)


def test_processes_can_open_a_new_store_at_once(tmp_path: Path) -> None:
    # The server of forks imports once for all four, so that they start within milliseconds of each other.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    batch_writes, parents = context.Barrier(4), context.Queue()
    workers = [context.Process(target=open_at_once, args=(tmp_path, batch_writes, i, parents)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    assert len({parents.get(timeout=5) for _ in workers}) == 1
    names = {study.name for study in queries.studies(MlflowTracker(tmp_path))}
    assert names == {"shared-v1-digits", *(f"own{i}-v1-digits" for i in range(4))}


CLOSED = "127.0.0.1:9"  # the port of `discard`, where nobody listens
BAD_ADDRESSES = [
    f"http://maria:hunter2@{CLOSED}",
    f"postgresql+psycopg://maria:hunter2@{CLOSED}/runs",
    f"postgresql+psycopg://maria:hun@ter2@{CLOSED}/runs",  # @ in a password should be %40, and often isn't
    f"postgresql+psycopg://{CLOSED}/runs?user=maria&password=hunter2",
    "postgresql+psycopg://maria:hunter2@127.0.0.1:port/runs",
    "oracle://maria:hunter2@127.0.0.1/runs",
    "nosuch://maria:hunter2@127.0.0.1/runs",
    "maria:hunter2@127.0.0.1/runs",
    "sqlite:////no/such/folder/mlflow.db",
    "file:///tmp/mlruns",
    "no/such/folder",
]


@pytest.mark.parametrize("uri", BAD_ADDRESSES)
def test_unusable_address_is_one_line_without_the_password(uri: str, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=r"^`--tracking-uri` .*can't be opened") as caught:
        MlflowTracker(tmp_path, uri)
    assert time.monotonic() - started < 40
    assert len(caught.value.lines) == 1
    assert not re.search("hunter2|ter2|maria:", str(caught.value))
    assert "mlruns/mlflow.db" in str(caught.value)


def test_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"not a database " * 1000)
    with pytest.raises(UserError, match="not a database"):
        MlflowTracker(tmp_path)


@pytest.mark.parametrize("statement", ["", "CREATE TABLE metrics", "DROP TABLE metrics"])
def test_first_start_can_be_killed_while_it_creates_tables(statement: str, tmp_path: Path) -> None:
    """The last of them leaves a table behind that its migration makes, and can't make again."""
    killed = f"""
import os, signal
from sqlalchemy import Engine, event

@event.listens_for(Engine, "after_cursor_execute")
def die(connection, cursor, words, *others):
    if {statement!r} in words:
        os.kill(os.getpid(), signal.SIGKILL)
"""
    start = """
import sys
from pathlib import Path
from pipeline.tracking.tracker import MlflowTracker
assert MlflowTracker(Path(sys.argv[1])).client.search_experiments()
"""
    assert shared_fork_server().script(killed + start, str(tmp_path)).wait() == -signal.SIGKILL
    assert not (tmp_path / "mlflow.db").exists()
    assert shared_fork_server().script(start, str(tmp_path)).wait() == 0
    assert {path.name for path in tmp_path.iterdir() if "mlflow.db" in path.name} <= {
        *("mlflow.db", "mlflow.db-wal", "mlflow.db-shm")
    }


def test_silent_server_is_refused_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tracking.store._PROBE_S", 1.0)
    with socket.create_server((HOST, 0)) as silent:
        began = time.monotonic()
        with pytest.raises(UserError, match=r"^`--tracking-uri` .*can't be opened.*Read timed"):
            MlflowTracker(tmp_path, f"http://{HOST}:{silent.getsockname()[1]}")
    assert time.monotonic() - began < 10, "asked once"


def test_deleted_experiment_is_refused_with_a_remedy(tmp_path: Path) -> None:
    tracker = MlflowTracker(tmp_path)
    tracker.client.delete_experiment(tracker.store.experiment("deleted-v1-digits"))
    with pytest.raises(UserError, match=r"deleted-v1-digits: was deleted.*restore.*`--version`") as caught:
        tracker.open_study("deleted-v1-digits", "Why?", "val/accuracy", [])
    assert len(caught.value.lines) == 1


class CloudFault(Exception):
    """As botocore's, which derive from nothing else."""


def test_outages_are_retried_and_rejections_are_not() -> None:
    assert not is_permanent(DiskFault("full"))
    assert not is_permanent(ConnectionError("no"))
    assert not is_permanent(MlflowException("503", codes.TEMPORARILY_UNAVAILABLE))
    assert not is_permanent(MlflowException("slow down", codes.REQUEST_LIMIT_EXCEEDED))
    assert not is_permanent(MlflowException("(Background on: https://sqlalche.me/e/20/rvf5)", codes.BAD_REQUEST))
    assert not is_permanent(CloudFault("Could not connect to the endpoint URL"))
    assert not is_permanent(KeyError("run"))  # of an empty answer
    assert not is_permanent(OperationalError("SELECT", {}, Exception("away")))
    assert is_permanent(MlflowException("no such run", codes.RESOURCE_DOES_NOT_EXIST))
    assert is_permanent(UserError("deleted"))
    assert is_permanent(PermissionError("artifacts"))
    assert is_permanent(TypeError("a bug"))
