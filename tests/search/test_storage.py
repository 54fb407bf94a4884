"""The study's database: locked, restarted, its replies lost; real databases."""

import datetime
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from fork_server import shared_fork_server
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from sqlalchemy import event, text
from sqlalchemy.exc import PendingRollbackError

from pipeline.errors import UserError
from pipeline.search import storage
from pipeline.search.optuna_internals import TrialParam, study_id, trial_id
from pipeline.search.storage import RetryingStorage, StorageUnavailable, open_storage

ME, OTHER = {"id": "me"}, {"id": "other"}


def impatient_storage(home: Path) -> RetryingStorage:
    """SQLite itself waits for a lock no longer than 50 ms."""
    open_storage(home)
    return RetryingStorage(f"sqlite:///{home / 'optuna.db'}", {"connect_args": {"timeout": 0.05}})


def waiting_trial(store: RetryingStorage) -> tuple[optuna.Study, int]:
    study = optuna.create_study(storage=store, study_name="s", direction="maximize")
    study.enqueue_trial({"x": 1.0}, user_attrs={"released": True})
    return study, trial_id(study.trials[0])


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


def test_new_database_has_its_write_ahead_log(tmp_path: Path) -> None:
    with storage.open_storage(tmp_path).engine.connect() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"


def test_locked_database_is_waited_for(tmp_path: Path) -> None:
    store = impatient_storage(tmp_path)
    study, waiting = waiting_trial(store)
    with held_lock(tmp_path, 0.6):
        assert store.claim(waiting, ME)
    with held_lock(tmp_path, 0.6):
        study.enqueue_trial({})
    assert [trial.state for trial in study.trials] == [TrialState.RUNNING, TrialState.WAITING]


def test_database_that_stays_away_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = impatient_storage(tmp_path)
    _, waiting = waiting_trial(store)
    monkeypatch.setattr(storage, "MAX_WAIT_S", 0.3)
    with (
        held_lock(tmp_path, 1.5),
        pytest.raises(StorageUnavailable, match=r"no answer for .* the same command resumes the study"),
    ):
        store.claim(waiting, ME)


def test_waiting_can_be_ended_and_heartbeats_do_not_wait(tmp_path: Path) -> None:
    store = impatient_storage(tmp_path)
    _, waiting = waiting_trial(store)

    def stop() -> None:
        raise InterruptedError

    with held_lock(tmp_path, 0.7):
        with store.without_retries(), pytest.raises(optuna.exceptions.StorageInternalError):
            store.set_trial_user_attr(waiting, "heartbeat", 1)
        store.while_waiting = stop
        with pytest.raises(InterruptedError):
            store.set_trial_user_attr(waiting, "x", 1)


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


def test_connection_that_broke_during_a_read_is_replaced(tmp_path: Path) -> None:
    """SQLAlchemy's error where PostgreSQL goes away between two queries."""
    store = open_storage(tmp_path)
    study, _ = waiting_trial(store)
    queries: list[str] = []

    @event.listens_for(store.engine, "before_cursor_execute")
    def break_once(connection: Any, cursor: Any, query: str, *rest: Any) -> None:
        queries.append(query)
        if len(queries) == 2:
            raise PendingRollbackError("can't reconnect until invalid transaction is rolled back")

    assert len(store.read_trials(study_id(study), None, set(), -1)) == 1
    assert len(queries) > 2


def test_new_trial_whose_reply_was_lost_is_made_once(
    lost_reply: tuple[RetryingStorage, Callable[[], None]],
) -> None:
    store, lose = lost_reply
    study, _ = waiting_trial(store)
    lose()
    study.enqueue_trial({"x": 2.0})
    assert [trial.system_attrs["fixed_params"]["x"] for trial in study.trials] == [1, 2]


def test_claim_whose_reply_was_lost_is_recognised(lost_reply: tuple[RetryingStorage, Callable[[], None]]) -> None:
    store, lose = lost_reply
    _, waiting = waiting_trial(store)
    lose()
    assert store.claim(waiting, ME)
    assert not store.claim(waiting, OTHER)
    assert not store.claim(waiting, ME), "a claimed trial is not claimed again"
    assert store.get_trial(waiting).user_attrs["worker"] == ME


def test_result_whose_reply_was_lost_is_stored_once(lost_reply: tuple[RetryingStorage, Callable[[], None]]) -> None:
    store, lose = lost_reply
    study, waiting = waiting_trial(store)
    assert store.claim(waiting, ME)
    lose()
    study.tell(0, 0.5)
    assert (study.trials[0].state, study.trials[0].value) == (TrialState.COMPLETE, 0.5)
    with pytest.raises(UpdateFinishedTrialError):
        store.set_trial_state_values(waiting, TrialState.COMPLETE, [0.5])


def test_simultaneous_claims_give_a_trial_to_one_worker(tmp_path: Path) -> None:
    stores = [open_storage(tmp_path) for _ in range(4)]
    study, _ = waiting_trial(stores[0])
    for _ in range(9):
        study.enqueue_trial({}, user_attrs={"released": True})
    won: list[list[int]] = [[] for _ in stores]
    start = threading.Barrier(len(stores))

    def claim(worker: int) -> None:
        for candidate in stores[worker].released(study_id(study)):
            start.wait()
            if stores[worker].claim(candidate, {"id": worker}):
                won[worker].append(candidate)

    threads = [threading.Thread(target=claim, args=[worker]) for worker in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed for ids in won for claimed in ids) == [trial_id(trial) for trial in study.trials]
    for worker, ids in enumerate(won):
        assert all(stores[0].get_trial(claimed).user_attrs["worker"] == {"id": worker} for claimed in ids)


def test_claim_stores_the_start_in_any_time_zone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        store = open_storage(tmp_path)
        _, waiting = waiting_trial(store)
        assert store.claim(waiting, {"id": 1})
        began = store.get_trial(waiting).datetime_start
        assert began and abs(datetime.datetime.now() - began) < datetime.timedelta(minutes=5)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_batch_is_written_in_one_transaction_at_its_end(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    with storage.batch_writes():
        rate = trial.suggest_float("lr", 0, 1)
        trial.set_user_attr("epochs", 2)
        trial.set_user_attr("epochs", 3)
        assert not storage.get_trial(trial_id(trial)).params
    stored = storage.get_trial(trial_id(trial))
    assert (stored.params, stored.user_attrs) == ({"lr": rate}, {"epochs": 3})
    again = [TrialParam(trial_id(trial), "lr", rate, stored.distributions["lr"])]
    storage.write_at_once(trial_id(trial), again, {"epochs": 4})  # as after a reply that was lost
    assert storage.get_trial(trial_id(trial)).user_attrs == {"epochs": 4}
    study.tell(trial, 1.0)
    with pytest.raises(UpdateFinishedTrialError), storage.batch_writes():
        trial.set_user_attr("epochs", 5)


# -------------------------------------------------------------------------------------------------------- PostgreSQL


def restart(server: Any, away_s: float) -> None:
    server.stop()
    time.sleep(away_s)
    server.start()


def test_postgresql_restart_costs_no_call(postgresql: Any, tmp_path: Path) -> None:
    store = open_storage(tmp_path, postgresql.get_uri())
    study, waiting = waiting_trial(store)
    assert store.claim(waiting, ME)
    thread = threading.Thread(target=restart, args=[postgresql, 0.5])
    thread.start()
    began, calls = time.monotonic(), 0
    while thread.is_alive() or calls % 20:
        store.set_trial_intermediate_value(waiting, calls, float(calls))
        study.enqueue_trial({"x": calls})
        calls += 1
        assert time.monotonic() - began < 60
    trials = study.trials
    assert list(trials[0].intermediate_values) == list(range(calls))
    assert [trial.system_attrs["fixed_params"]["x"] for trial in trials[1:]] == list(range(calls))
    store.remove_session()
    store.engine.dispose()


# ------------------------------------------------------------------------------------------------------------ starts


@pytest.mark.chaos
def test_eight_first_starts_create_one_store(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.search.storage import open_storage;"
        "from pipeline.tracking.tracker import MlflowTracker; home = Path(sys.argv[1]) / 'mlruns';"
        "s = open_storage(home); print(len(s.get_all_studies())); MlflowTracker(home).store.experiment('x')"
    )
    starts = [shared_fork_server().script(code, str(tmp_path)) for _ in range(8)]
    assert [start.wait() for start in starts] == [0] * 8


def test_refused_storage_is_one_line_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        open_storage(tmp_path, "postgresql://me:secret@127.0.0.1:9/none")
    assert len(caught.value.lines) == 1
    assert "secret" not in caught.value.lines[0]
    assert caught.value.lines[0].startswith("`--storage` postgresql+psycopg://***@127.0.0.1:9/none: can't be opened")


def test_several_first_starts_create_one_database(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.search.storage import open_storage; import optuna;"
        "from filelock import FileLock; s = open_storage(Path(sys.argv[1])); print(len(s.get_all_studies()))"
    )
    starts = [shared_fork_server().script(code, str(tmp_path)) for _ in range(4)]
    assert [start.wait() for start in starts] == [0] * 4
