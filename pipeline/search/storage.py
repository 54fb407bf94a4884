"""Where Optuna keeps a study: SQLite on one machine, PostgreSQL beyond; and how it waits for its database."""

import contextlib
import functools
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import optuna
from filelock import FileLock
from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import Connection, NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, PendingRollbackError

from pipeline.data.datasets import SOURCES
from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError, first_line, redact_uri
from pipeline.evaluation.constraints import violations
from pipeline.experiment import known_before
from pipeline.processes import PROBE_S
from pipeline.recipe import Recipe
from pipeline.search.optuna_internals import SqlStorage, TrialParam, check_compatible
from pipeline.search.search import Search, check_same
from pipeline.search.starts import not_as_named, starts
from pipeline.search.study_attributes import StudyAttributes
from pipeline.search.trial_attributes import TrialAttributes, counts_toward_budget
from pipeline.tracking.run_data import newest_first
from pipeline.tracking.sqlite import use_write_ahead_log
from pipeline.tracking.study_key import StudyKey

log = logging.getLogger(__name__)

MAX_WAIT_S = 600.0  # for a database that is away
LONGEST_PAUSE_S = 5.0


class StorageUnavailable(UserError):
    """The study's database did not answer for MAX_WAIT_S."""


Method = TypeVar("Method", bound=Callable[..., Any])


def retried(method: Method) -> Method:
    """A method of RetryingStorage that is repeated until the database answers.

    Methods call each other: the outermost one repeats, so that a transaction is repeated as a whole.
    """

    @functools.wraps(method)
    def repeat(self: "RetryingStorage", *arguments: Any, **options: Any) -> Any:
        local = self._local
        if local.is_inside:
            return method(self, *arguments, **options)
        local.is_inside, local.repetitions = True, 0
        deadline = time.monotonic() + MAX_WAIT_S
        try:
            while True:
                try:
                    return method(self, *arguments, **options)
                except (StorageInternalError, DBAPIError, PendingRollbackError) as error:
                    if not _is_away(error):
                        raise
                    self.while_waiting()
                    local.repetitions += 1
                    _wait(self.url, error, local.repetitions, deadline)
        finally:
            local.is_inside = False

    return cast(Method, repeat)


class _ThreadState(threading.local):
    """What a thread is doing with a storage."""

    is_inside = False  # a call that is repeated already, or that is not to be repeated
    repetitions = 0  # of the current call
    params: list[TrialParam] | None = None  # of the current batch; None outside of one
    attributes: dict[int, dict[str, Any]] | None = None  # of the current batch: trial id -> attributes


class RetryingStorage(SqlStorage):
    """Repeats a call that the database did not answer: PostgreSQL restarts, an SQLite file is locked.

    The first try may have succeeded and only its reply was lost, so each call can be repeated without harm: a write of an
    attribute or a value writes it again, a new trial is looked for before it is made again, and `claim` and
    `set_trial_state_values` recognise their own work. `while_waiting` is called before each repetition and may raise.
    Raises StorageUnavailable after MAX_WAIT_S.
    """

    while_waiting: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, url: str, engine_kwargs: dict[str, Any]):
        self._local = _ThreadState()
        super().__init__(url, engine_kwargs)

    # All that reaches the database.
    create_new_study = retried(SqlStorage.create_new_study)
    set_study_user_attr = retried(SqlStorage.set_study_user_attr)
    set_study_system_attr = retried(SqlStorage.set_study_system_attr)
    get_study_id_from_name = retried(SqlStorage.get_study_id_from_name)
    get_study_name_from_id = retried(SqlStorage.get_study_name_from_id)
    get_study_directions = retried(SqlStorage.get_study_directions)
    get_study_user_attrs = retried(SqlStorage.get_study_user_attrs)
    get_study_system_attrs = retried(SqlStorage.get_study_system_attrs)
    get_all_studies = retried(SqlStorage.get_all_studies)
    create_trial = retried(SqlStorage.create_trial)
    read_trials = retried(SqlStorage.read_trials)
    get_trial = retried(SqlStorage.get_trial)
    best_trial_id = retried(SqlStorage.best_trial_id)
    get_trial_id_from_study_id_trial_number = retried(SqlStorage.get_trial_id_from_study_id_trial_number)
    set_trial_intermediate_value = retried(SqlStorage.set_trial_intermediate_value)
    set_trial_system_attr = retried(SqlStorage.set_trial_system_attr)
    released = retried(SqlStorage.released)
    state_of = retried(SqlStorage.state_of)
    write_at_once = retried(SqlStorage.write_at_once)

    @retried
    def claim(self, trial_id: int, worker: Mapping[str, Any]) -> bool:
        """See SqlStorage."""
        if super().claim(trial_id, worker):
            return True
        return self._local.repetitions > 0 and self.worker_of(trial_id) == worker

    @retried
    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Any = None) -> bool:
        """See BaseStorage."""
        try:
            return super().set_trial_state_values(trial_id, state, values)
        except UpdateFinishedTrialError:
            stored = super().get_trial(trial_id) if self._local.repetitions else None
            if stored is None or (stored.state, stored.values) != (state, None if values is None else list(values)):
                raise
            return True  # stored by an earlier try, whose reply was lost

    @retried
    def set_param(self, param: TrialParam, previous_distribution: BaseDistribution | None) -> None:
        """See SqlStorage."""
        if (params := self._local.params) is None:
            super().set_param(param, previous_distribution)
        else:
            check_compatible(param, previous_distribution)
            params.append(param)

    @retried
    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """See BaseStorage."""
        if (attributes := self._local.attributes) is None:
            super().set_trial_user_attr(trial_id, key, value)
        else:
            attributes.setdefault(trial_id, {})[key] = value

    @contextlib.contextmanager
    def without_retries(self) -> Iterator[None]:
        """Calls of this thread are not repeated while the block runs."""
        self._local.is_inside, self._local.repetitions = True, 0
        try:
            yield
        finally:
            self._local.is_inside = False

    @contextlib.contextmanager
    def batch_writes(self) -> Iterator[None]:
        """Parameters and user attributes that this thread sets in the block are written at its end, in one transaction.

        Optuna has a transaction for each, of two or three statements. Nothing that was set can be read before the end.
        """
        local = self._local
        params: list[TrialParam] = []
        attributes: dict[int, dict[str, Any]] = {}
        local.params, local.attributes = params, attributes
        try:
            yield
        finally:
            local.params = local.attributes = None
            for trial_id in {param.trial_id for param in params} | set(attributes):
                own_params = [param for param in params if param.trial_id == trial_id]
                self.write_at_once(trial_id, own_params, attributes.get(trial_id, {}))


def _is_away(error: BaseException) -> bool:
    """Whether a database may answer the same call later; Optuna wraps what SQLAlchemy raises."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if isinstance(cause, PendingRollbackError):  # the connection broke in the middle of a transaction
        return True
    if not isinstance(cause, (OperationalError, InterfaceError)):
        return isinstance(cause, DBAPIError) and cause.connection_invalidated
    is_sqlite = type(cause.orig).__module__.startswith("sqlite3")
    return not is_sqlite or "locked" in str(cause.orig) or "busy" in str(cause.orig)


def _wait(url: str, error: BaseException, repetition: int, deadline: float) -> None:
    """Pause before a repetition, from 1; StorageUnavailable after the deadline."""
    reason, minutes = first_line(error.__cause__ or error, url), MAX_WAIT_S / 60
    if time.monotonic() > deadline:
        raise StorageUnavailable(
            f"`--storage` {redact_uri(url)}",
            f"no answer for {minutes:.0f} minutes ({reason})",
            "the same command resumes the study when it answers",
        ) from None
    if repetition == 6:  # after some seconds: longer than a file stays locked
        log.info("the study's database does not answer (%s); trying for up to %.0f minutes", reason, minutes)
    time.sleep(min(LONGEST_PAUSE_S, 0.05 * 2**repetition))


def open_storage(home: Path, url: str | None = None, wait: bool = False) -> RetryingStorage:
    """`optuna.db` in the folder mlruns, or another database by its SQLAlchemy address; UserError where it can't be opened.

    With `wait` it is tried for MAX_WAIT_S: a worker may start while the database is away.
    """
    remedy = "correct it, or " + ("omit it for mlruns/optuna.db" if url else "move that file away")
    url = url or f"sqlite:///{home.resolve() / 'optuna.db'}"
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.startswith("sqlite"):
        options["connect_args"] = {"timeout": 60}
    else:
        url = url.replace("postgresql://", "postgresql+psycopg://", 1)
        options |= {"pool_size": 1, "max_overflow": 2}
    subject = f"`--storage` {redact_uri(url)}"
    deadline, tries = time.monotonic() + MAX_WAIT_S, 0
    while True:
        try:
            home.mkdir(parents=True, exist_ok=True)
            with FileLock(home / "optuna.lock"):  # several processes that start at once would each create the tables
                use_write_ahead_log(engine := create_engine(url, **options))  # before the tables, none of which then
                engine.dispose()  # waits for the disk
                return RetryingStorage(url, options)
        except ImportError:
            raise UserError(subject, "needs a driver", ".venv/bin/pip install -e '.[postgres]'") from None
        except Exception as error:  # whatever a driver raises: the address is the user's
            if not (wait and _is_away(error)):
                raise UserError(subject, f"can't be opened ({first_line(error, url)})", remedy) from None
            tries += 1
            _wait(url, error, tries, deadline)


def resolved(search: Search, data: TrainingData, storage: RDBStorage) -> Search:
    """The search with the key that its study has in the storage, or will have, and the data set's name in its recipes.

    1. The study of this name and version on the same images, wherever they lay and whatever their folder was called.
    2. A study that ran on this very folder when other images were in it; it is then refused as changed, so that one
       question does not become two unnoticed.
    3. A new study.

    Recipes keep the name that the data set had first: a folder that moved makes no other recipe, and interrupted trials
    can be resumed.
    """
    if search.stored_key:
        return search
    own, typed = StudyKey(search.name, search.version, data.name), search.base.data.dataset
    parsed = [StudyKey.parse(name) for name in optuna.get_all_study_names(storage)]
    keys = [key for key in parsed if key and (key.study, key.version) == (own.study, own.version)]
    stored = {
        str(key): StudyAttributes.parse(storage.get_study_user_attrs(storage.get_study_id_from_name(str(key))))
        for key in keys
    }
    candidates = [name for name in stored if name == str(own)]
    candidates += [name for name, attributes in stored.items() if attributes.fingerprint.get("data") == data.digest]
    candidates += [
        name
        for name, attributes in stored.items()
        if data.place in (_guessed_places(name, own, data) if attributes.places is None else attributes.places)
    ]
    name = [*candidates, str(own)][0]
    if name != str(own):
        log.info("%s: belongs to the study %s", data.source, name)
    elif name not in stored and (others := [str(key) for key in keys if key.bare == own.bare]):
        log.info("%s: a new study %s; others of that name have other images: %s", data.source, name, ", ".join(others))
    dataset = stored[name].dataset if name in stored else None
    settings = {**search.settings, "data.dataset": dataset or typed}
    return replace(search, stored_key=name, settings=settings, dataset_path=typed)


def _guessed_places(name: str, own: StudyKey, data: TrainingData) -> list[str | None]:
    """Those of a study that did not get as far as to store them: a folder of the name in its key.

    A data set of its own, as `digits`, was in no folder.
    """
    was_here = name == str(own.bare) and own.bare.data not in SOURCES
    return [data.place] if was_here else []


def open_study(search: Search, data: TrainingData, storage: RDBStorage, home: Path) -> optuna.Study:
    """The Optuna study of this search, resumed, or made with the control as its first trial.

    Raises UserError where it exists and asks another question.
    """
    search = resolved(search, data, storage)
    key, fingerprint = search.key(data), search.fingerprint(data)
    with FileLock(home / "optuna.lock"):
        study = optuna.create_study(
            storage=storage,
            study_name=key,
            load_if_exists=True,
            direction="maximize",
            pruner=search.pruner(),
        )
        stored = StudyAttributes.of(study)
        if stored.fingerprint:
            check_same(key, stored.fingerprint, fingerprint, search.version)
        if data.listed:
            data.listed.fix(home)
        places = newest_first(stored.places or [], data.place)
        StudyAttributes.update(study, fingerprint=fingerprint, places=places, dataset=search.base.data.dataset)
        _give_first_trials(study, search, data, storage)
    study.sampler = search.sampler(len(study.get_trials(deepcopy=False)))
    return study


def _give_first_trials(study: optuna.Study, search: Search, data: TrainingData, storage: RDBStorage) -> None:
    """Enqueue the control and the starts, where none but the control has begun; those that are there already stay."""
    trials = study.get_trials(deepcopy=False)
    attributes = {trial.number: TrialAttributes.of(trial) for trial in trials}
    if any(trial.state is not TrialState.WAITING and not attributes[trial.number].control for trial in trials):
        return
    if not any(found.control for found in attributes.values()):
        study.enqueue_trial(search.control(), user_attrs=TrialAttributes(control=True).to_optuna())
    bounds = search.study.constraints

    def is_feasible(recipe: Recipe) -> bool:
        return not violations(bounds, known_before(bounds, recipe, data))

    given = starts(search, search.start_from, our_studies(storage), is_feasible)
    new = given[sum(bool(found.start) for found in attributes.values()) :]
    for start in new:
        about = TrialAttributes(start=start.source, short=search.shortens)
        study.enqueue_trial(dict(start.params), user_attrs=about.to_optuna())
    if new:
        log.info("first trials after the control: %s", "; ".join(start.source for start in given))
    for line in not_as_named(search, given) if new or not trials else []:
        log.info("%s", line)


def find_study(search: Search, data: TrainingData, storage: RDBStorage) -> optuna.Study | None:
    """The stored study of this search, if there is one; UserError where it asks another question."""
    key = resolved(search, data, storage).key(data)
    if key not in optuna.get_all_study_names(storage):
        return None
    study = optuna.load_study(study_name=key, storage=storage)
    fingerprint = StudyAttributes.of(study).fingerprint
    if not fingerprint:  # its first start was killed before it asked anything
        return None
    check_same(key, fingerprint, search.fingerprint(data), search.version)
    return study


def our_studies(storage: RDBStorage) -> list[optuna.Study]:
    """Every stored study that this project made."""
    studies = [optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage)]
    return [study for study in studies if StudyAttributes.of(study).fingerprint]


class StudyLock:
    """One command at a time for a study, on any machine: a lock that PostgreSQL holds as long as the connection lives.

    UserError where another command holds it. It does nothing on SQLite, which serves one machine: there
    `processes.study_lock` is enough.
    """

    def __init__(self, storage: RDBStorage, key: str):
        self._key = key
        self._number = int.from_bytes(hashlib.sha256(f"pipeline {key}".encode()).digest()[:8], "big", signed=True)
        self._engine = create_engine(storage.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        self._connection: Connection | None = None
        if self._engine.dialect.name == "postgresql":
            self._connection = self._acquire()

    def close(self) -> None:
        """Give the lock back."""
        if self._connection:
            with contextlib.suppress(DBAPIError):
                self._connection.close()
            self._connection = None

    def check(self) -> None:
        """Acquire the lock again where the connection was lost; UserError where another command was faster."""
        if self._engine.dialect.name != "postgresql":
            return
        try:
            if self._connection:
                self._connection.execute(text("SELECT 1"))
            else:
                self._connection = self._acquire()
        except DBAPIError:  # the database is away; it may be back at the next check
            self.close()

    def _acquire(self) -> Connection:
        connection = self._engine.connect()
        query, deadline = text("SELECT pg_try_advisory_lock(:number)"), time.monotonic() + PROBE_S
        while not connection.execute(query, {"number": self._number}).scalar():
            if time.monotonic() > deadline:
                connection.close()
                raise UserError(
                    f"study {self._key}",
                    "another command is running it, maybe on another machine",
                    "wait for it, or stop it",
                )
            time.sleep(0.05)
        return connection


def num_finished(study: optuna.Study) -> int:
    """How many trials count toward the budget."""
    return sum(counts_toward_budget(trial) for trial in study.get_trials(deepcopy=False))
