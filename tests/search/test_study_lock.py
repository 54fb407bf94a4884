"""A study's lock: a file's, and a real PostgreSQL's."""

import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.processes import study_lock
from pipeline.search.storage import RetryingStorage, open_storage
from pipeline.search.study_lock import StudyLock


def test_lock_is_the_file_that_finals_take(tmp_path: Path) -> None:
    lock = StudyLock(open_storage(tmp_path), tmp_path, "a")
    with study_lock("a", tmp_path), pytest.raises(UserError, match="study a: another command is running it"), lock:
        pass
    with lock:
        lock.check()
        with pytest.raises(UserError, match="another command"), study_lock("a", tmp_path):
            pass
    with study_lock("a", tmp_path):
        pass


def on_another_machine(store: RetryingStorage, home: Path, key: str = "a") -> StudyLock:
    return StudyLock(store, home / "elsewhere", key)


def test_lock_is_held_once_and_reacquired_after_a_restart(postgresql: Any, tmp_path: Path) -> None:
    store = open_storage(tmp_path, postgresql.get_uri())
    elsewhere = on_another_machine(store, tmp_path)
    with StudyLock(store, tmp_path, "a") as first:
        with on_another_machine(store, tmp_path, "b"):
            pass
        with pytest.raises(UserError, match="another command is running it, maybe on another machine"), elsewhere:
            pass
        restart(postgresql)
        first.check()  # finds the connection gone
        first.check()
        with pytest.raises(UserError, match="another command"), elsewhere:
            pass
        restart(postgresql)
        with elsewhere:
            first.check()
            with pytest.raises(UserError, match="another command"):
                first.check()
    store.engine.dispose()


def restart(server: Any) -> None:
    server.stop()
    server.start()


def test_lock_that_the_database_refuses_leaves_the_file_free(postgresql: Any, tmp_path: Path) -> None:
    store = open_storage(tmp_path, postgresql.get_uri())
    with on_another_machine(store, tmp_path), pytest.raises(UserError), StudyLock(store, tmp_path, "a"):
        pass
    with study_lock("a", tmp_path):
        pass
    store.engine.dispose()


def test_lock_outlasts_a_look_whether_the_study_runs(postgresql: Any, tmp_path: Path) -> None:
    store = open_storage(tmp_path, postgresql.get_uri())
    looking = on_another_machine(store, tmp_path)  # as `audit` takes it
    looking.__enter__()
    threading.Timer(0.1, looking.__exit__).start()
    with StudyLock(store, tmp_path, "a"):
        pass
    store.engine.dispose()
