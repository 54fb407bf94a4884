"""Where Optuna keeps a study: SQLite on one machine, PostgreSQL beyond; and how it waits for its database."""

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from filelock import FileLock
from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import TrialState
from sqlalchemy import create_engine
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, PendingRollbackError

from pipeline.errors import UserError, first_line, redact_uri
from pipeline.search.optuna_internals import SqlStorage, TrialParam, check_compatible
from pipeline.tracking.sqlite import use_write_ahead_log

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
