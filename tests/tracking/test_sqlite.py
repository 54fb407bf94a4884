"""Commits do not wait for the disk, and outlive their process all the same."""

import contextlib
import signal
import sqlite3
from pathlib import Path

import mlflow.store.tracking.sqlalchemy_store
import optuna
from fork_server import shared_fork_server
from sqlalchemy import create_engine, text

from pipeline.search.storage import open_storage
from pipeline.tracking.sqlite import checkpoint
from pipeline.tracking.tracker import MlflowTracker

NORMAL = 1


def test_both_stores_use_the_log_and_do_not_wait_for_disk(tmp_path: Path) -> None:
    tracker, storage = MlflowTracker(tmp_path), open_storage(tmp_path)
    store = tracker.client._tracking_client.store
    assert isinstance(store, mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore)
    for engine in (store.engine, storage.engine):
        with engine.connect() as connection:
            assert connection.execute(text("PRAGMA synchronous")).scalar() == NORMAL
        with contextlib.closing(sqlite3.connect(engine.url.database)) as connection:
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_committed_rows_outlive_a_killed_process(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
import optuna
from pipeline.search.storage import open_storage
study = optuna.create_study(storage=open_storage(Path(sys.argv[1])), study_name="s")
study.set_user_attr("committed", True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert shared_fork_server().script(script, str(tmp_path)).wait() == -signal.SIGKILL
    with create_engine(f"sqlite:///{tmp_path / 'optuna.db'}").connect() as connection:
        assert connection.execute(text("SELECT value_json FROM study_user_attributes")).scalars().all() == ["true"]


def test_a_checkpoint_empties_the_log_into_the_database(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    optuna.create_study(storage=storage, study_name="s")
    log = tmp_path / "optuna.db-wal"
    assert log.stat().st_size > 0
    checkpoint(tmp_path / "optuna.db")
    assert log.stat().st_size == 0
    assert optuna.get_all_study_names(storage) == ["s"]
