"""Where Optuna keeps a study: SQLite on one machine, PostgreSQL beyond; and how it waits for its database."""

import contextlib
import datetime
import hashlib
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.distributions import BaseDistribution, check_distribution_compatibility, distribution_to_json
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.storages._rdb.storage import _create_scoped_session
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, PendingRollbackError

from pipeline.data.datasets import SOURCES
from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError, first_line, redact_uri
from pipeline.search.study import Search, check_same, counts_toward_budget
from pipeline.tracking.run_data import newest_first
from pipeline.tracking.sqlite import use_write_ahead_log
from pipeline.tracking.study_key import StudyKey

optuna.logging.set_verbosity(optuna.logging.ERROR)
log = logging.getLogger(__name__)

PATIENCE_S = 600.0  # for a database that is away
LONGEST_PAUSE_S = 5.0


class StorageUnavailable(UserError):
    """The study's database did not answer for PATIENCE_S."""


class RetryingStorage(RDBStorage):
    """Repeats a call that the database did not answer: PostgreSQL restarts, an SQLite file is locked.

    The first try may have been done and only its reply lost, so each call can be repeated without harm: what writes an
    attribute or a value writes it again, a new trial is looked for before it is made again, and `claim` and
    `set_trial_state_values` know their own work. `while_waiting` is called before each repetition and may raise.
    Raises StorageUnavailable after PATIENCE_S.
    """

    while_waiting: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, url: str, engine_kwargs: dict[str, Any]):
        self._tried: set[str] = set()  # tokens of new trials that may be there already
        self._repeats = threading.local()
        super().__init__(url, engine_kwargs)

    def claim(self, trial_id: int, worker: Mapping[str, Any]) -> bool:
        """Make a WAITING trial RUNNING and this worker's, in one transaction; False where somebody else was faster.

        Optuna's own way reads the state and then writes it, and on SQLite two workers can do so at once.
        """
        with self._session() as session:
            now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)  # as Optuna keeps times
            changes = {models.TrialModel.state: TrialState.RUNNING, models.TrialModel._datetime_start_utc: now}
            mine = session.query(models.TrialModel).filter_by(trial_id=trial_id, state=TrialState.WAITING)
            if mine.update(changes, synchronize_session=False):
                self._set_trial_attr_without_commit(
                    session, models.TrialUserAttributeModel, trial_id, "worker", dict(worker)
                )
                return True
            owner = session.query(models.TrialUserAttributeModel).filter_by(trial_id=trial_id, key="worker").first()
            return self._is_repeated and owner is not None and json.loads(owner.value_json) == worker

    def granted(self, study_id: int) -> list[int]:
        """The ids of the trials that wait and may be taken, the oldest first."""
        with self._session() as session:
            attribute = models.TrialUserAttributeModel
            query = session.query(models.TrialModel.trial_id).join(attribute)
            query = query.filter(models.TrialModel.study_id == study_id, models.TrialModel.state == TrialState.WAITING)
            query = query.filter(attribute.key == "granted", attribute.value_json == "true")
            return [trial_id for (trial_id,) in query.order_by(models.TrialModel.trial_id)]

    @contextlib.contextmanager
    def once(self) -> Iterator[None]:
        """Calls of this thread are not repeated while the block runs."""
        self._repeats.inside, self._repeats.count = True, 0
        try:
            yield
        finally:
            self._repeats.inside = False

    @contextlib.contextmanager
    def batch_writes(self) -> Iterator[None]:
        """What this thread sets of a trial in the block, parameters and user attributes, is written at its end, at once.

        Optuna's own way is a transaction for each, with two or three statements. Nothing that was set can be read before
        the end.
        """
        self._repeats.params, self._repeats.attributes = [], {}
        try:
            yield
        finally:
            params, attributes = self._repeats.params, self._repeats.attributes
            self._repeats.params = self._repeats.attributes = None
            for trial_id in {trial_id for trial_id, *_ in params} | set(attributes):
                mine = [param for param in params if param[0] == trial_id]
                self.set_at_once(trial_id, mine, attributes.get(trial_id, {}))

    def set_at_once(
        self, trial_id: int, params: list[tuple[int, str, float, BaseDistribution]], attributes: Mapping[str, Any]
    ) -> None:
        """Parameters, which a trial gets once, and user attributes, in one transaction."""
        with self._session() as session:
            trial: Any = models.TrialModel.find_or_raise_by_id(trial_id, session)
            self.check_trial_is_updatable(trial_id, trial.state)
            parameter, attribute = models.TrialParamModel, models.TrialUserAttributeModel
            there = {name for (name,) in session.query(parameter.param_name).filter_by(trial_id=trial_id)}
            session.add_all(
                parameter(
                    trial_id=trial_id,
                    param_name=name,
                    param_value=value,
                    distribution_json=distribution_to_json(distribution),
                )
                for _, name, value, distribution in params
                if name not in there  # of a try whose reply was lost
            )
            known = {stored.key: stored for stored in session.query(attribute).filter_by(trial_id=trial_id)}
            for key, value in attributes.items():
                if key in known:
                    known[key].value_json = json.dumps(value)
                else:
                    session.add(attribute(trial_id=trial_id, key=key, value_json=json.dumps(value)))

    def _set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
        previous_distribution: BaseDistribution | None,
    ) -> None:
        if (params := getattr(self._repeats, "params", None)) is None:
            super()._set_trial_param(trial_id, param_name, param_value_internal, distribution, previous_distribution)
        else:
            if previous_distribution is not None:
                check_distribution_compatibility(previous_distribution, distribution)
            params.append((trial_id, param_name, param_value_internal, distribution))

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """See BaseStorage."""
        if (attributes := getattr(self._repeats, "attributes", None)) is None:
            super().set_trial_user_attr(trial_id, key, value)
        else:
            attributes.setdefault(trial_id, {})[key] = value

    def state_of(self, trial_id: int) -> TrialState:
        """A trial's state, for the price of one short query."""
        with self._session() as session:
            (state,) = session.query(models.TrialModel.state).filter_by(trial_id=trial_id).one()
            return TrialState(state)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Any = None) -> bool:
        """See BaseStorage."""
        try:
            return super().set_trial_state_values(trial_id, state, values)
        except UpdateFinishedTrialError:
            stored = super().get_trial(trial_id) if self._is_repeated else None
            if stored is None or (stored.state, stored.values) != (state, None if values is None else list(values)):
                raise
            return True  # told before: only the reply was lost

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        if template_trial is not None:
            template_trial.system_attrs["token"] = uuid.uuid4().hex
        return super()._create_new_trial(study_id, template_trial)

    def _get_prepared_new_trial(self, study_id: int, template_trial: FrozenTrial | None, session: Any) -> Any:
        """Called in each try, in the transaction that makes the trial."""
        if template_trial is None:
            return super()._get_prepared_new_trial(study_id, template_trial, session)
        token = template_trial.system_attrs["token"]
        if token in self._tried:
            attribute = models.TrialSystemAttributeModel
            there = session.query(attribute).filter_by(key="token", value_json=json.dumps(token)).first()
            if there:
                return models.TrialModel.find_or_raise_by_id(there.trial_id, session)
        self._tried.add(token)
        return super()._get_prepared_new_trial(study_id, template_trial, session)

    def _session(self) -> Any:
        return _create_scoped_session(self.scoped_session)

    @property
    def _is_repeated(self) -> bool:
        return getattr(self._repeats, "count", 0) > 0


def _patient(name: str) -> Callable[..., Any]:
    """A method of RetryingStorage that is repeated until the database answers."""
    once = getattr(RetryingStorage, name)

    def patiently(self: RetryingStorage, *arguments: Any, **named: Any) -> Any:
        if getattr(self._repeats, "inside", False):  # one call calls others: the outermost repeats
            return once(self, *arguments, **named)
        self._repeats.inside, self._repeats.count = True, 0
        deadline = time.monotonic() + PATIENCE_S
        try:
            while True:
                try:
                    return once(self, *arguments, **named)
                except (StorageInternalError, DBAPIError, PendingRollbackError) as error:
                    if not _is_away(error):
                        raise
                    self.while_waiting()
                    self._repeats.count += 1
                    _wait(self.url, error, self._repeats.count, deadline)
        finally:
            self._repeats.inside = False

    patiently.__name__, patiently.__doc__ = name, once.__doc__
    return patiently


# All that reaches the database; `_CachedStorage`, which Optuna puts before it, calls some by their inner names.
for _name in (
    *("create_new_study", "set_study_user_attr", "set_study_system_attr", "get_study_id_from_name"),
    *("get_study_name_from_id", "get_study_directions", "get_study_user_attrs", "get_study_system_attrs"),
    *("get_all_studies", "_create_new_trial", "_set_trial_param", "set_trial_state_values", "get_trial", "_get_trials"),
    *("set_trial_intermediate_value", "set_trial_user_attr", "set_trial_system_attr", "_get_best_trial_id"),
    *("get_trial_id_from_study_id_trial_number", "claim", "granted", "state_of", "set_at_once"),
):
    setattr(RetryingStorage, _name, _patient(_name))


def _is_away(error: BaseException) -> bool:
    """Whether a database may answer the same call later; Optuna wraps what SQLAlchemy raises."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if isinstance(cause, PendingRollbackError):  # the connection broke in the middle of a transaction
        return True
    if not isinstance(cause, (OperationalError, InterfaceError)):
        return isinstance(cause, DBAPIError) and cause.connection_invalidated
    is_sqlite = type(cause.orig).__module__.startswith("sqlite3")
    return not is_sqlite or "locked" in str(cause.orig) or "busy" in str(cause.orig)


def _wait(url: str, error: BaseException, count: int, deadline: float) -> None:
    reason = first_line(error.__cause__ or error, url)
    if time.monotonic() > deadline:
        raise StorageUnavailable(
            f"STORAGE {redact_uri(url)}: no answer for {PATIENCE_S / 60:.0f} minutes ({reason}); "
            "the same command goes on when it answers"
        ) from None
    if count == 6:  # some seconds: more than a locked file's
        log.info("the study's database does not answer (%s); trying for up to %.0f minutes", reason, PATIENCE_S / 60)
    time.sleep(min(LONGEST_PAUSE_S, 0.05 * 2**count))


def open_storage(home: Path, url: str | None = None, wait: bool = False) -> RetryingStorage:
    """`optuna.db` in the home folder, or another database by its SQLAlchemy address; UserError where it can't be opened.

    With `wait` it is tried for PATIENCE_S: whoever starts in mid-study may come while the database is away.
    """
    way_out = "leave it out for mlruns/optuna.db" if url else "move that file away"
    url = url or f"sqlite:///{home.resolve() / 'optuna.db'}"
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.startswith("sqlite"):
        options["connect_args"] = {"timeout": 60}
    else:
        url = url.replace("postgresql://", "postgresql+psycopg://", 1)
        options |= {"pool_size": 1, "max_overflow": 2}
    deadline, count = time.monotonic() + PATIENCE_S, 0
    while True:
        try:
            home.mkdir(parents=True, exist_ok=True)
            with FileLock(home / "optuna.lock"):  # first starts at the same time would each create the tables
                storage = RetryingStorage(url, options)
                use_write_ahead_log(storage.engine)
                return storage
        except ImportError:
            raise UserError(
                f"STORAGE {redact_uri(url)}: needs a driver; .venv/bin/pip install -e '.[postgres]'"
            ) from None
        except Exception as error:  # whatever a driver raises: the address is the user's
            if not (wait and _is_away(error)):
                reason = first_line(error, url)
                raise UserError(
                    f"STORAGE {redact_uri(url)}: can't be opened ({reason}); mend it, or {way_out}"
                ) from None
            count += 1
            _wait(url, error, count, deadline)


def resolved(search: Search, data: TrainingData, storage: RDBStorage) -> Search:
    """The search with the key that its study has in the store, or will have, and with the data set's name in its recipes.

    First the study of this name and version on the same images, wherever they lay then and whatever their folder was
    called; else one that was run on this very folder when other images were in it, which is then refused as changed: a
    question must not become two unnoticed; else a new one. Recipes keep the name that the data set had first: a folder
    that moved is no other recipe, and what was interrupted can go on.
    """
    if search.stored_key:
        return search
    own, typed = StudyKey(search.name, search.version, data.name), search.base.data.dataset
    parsed = [StudyKey.parse(name) for name in optuna.get_all_study_names(storage)]
    keys = [key for key in parsed if key and (key.study, key.version) == (own.study, own.version)]
    known = {str(key): storage.get_study_user_attrs(storage.get_study_id_from_name(str(key))) for key in keys}
    same = [name for name in known if name == str(own)]
    same += [name for name, its in known.items() if json.loads(its.get("fingerprint", "{}")).get("data") == data.digest]
    here = [name for name, its in known.items() if data.place in its.get("places", _guessed_places(name, own, data))]
    name = [*same, *here, str(own)][0]
    if name != str(own):
        log.info("%s: belongs to the study %s", data.source, name)
    elif name not in known and (others := [str(key) for key in keys if key.bare == own.bare]):
        log.info("%s: a new study %s; others of that name have other images: %s", data.source, name, ", ".join(others))
    settings = {**search.settings, "data.dataset": known.get(name, {}).get("dataset", typed)}
    return replace(search, stored_key=name, settings=settings, lies_at=typed)


def _guessed_places(name: str, own: StudyKey, data: TrainingData) -> list[str | None]:
    """Those of a study from before they were kept, with a folder's bare name in its key: a folder of that name's.

    It gets a place when it goes on. A data set of its own, as `digits`, was in no folder.
    """
    was_here = name == str(own.bare) and own.bare.data not in SOURCES
    return [data.place] if was_here else []


def open_study(search: Search, data: TrainingData, storage: RDBStorage, home: Path) -> optuna.Study:
    """The Optuna study of this search, made with the control as its first trial, or resumed.

    Its attributes: `places`, where its data set lay, the newest first; `dataset`, as its recipes name it. Raises UserError
    where it exists and asks another question.
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
        stored = study.user_attrs.get("fingerprint")
        if stored is None:
            study.set_user_attr("fingerprint", json.dumps(fingerprint))
        else:
            check_same(key, json.loads(stored), fingerprint, search.version)
        places = newest_first(study.user_attrs.get("places", []), data.place)
        for name, value in (("places", places), ("dataset", search.base.data.dataset)):
            if study.user_attrs.get(name) != value:
                study.set_user_attr(name, value)
        if not study.get_trials(deepcopy=False):
            study.enqueue_trial(search.control(), user_attrs={"control": True})
    study.sampler = search.sampler(len(study.get_trials(deepcopy=False)))
    return study


def find_study(search: Search, data: TrainingData, storage: RDBStorage) -> optuna.Study | None:
    """The stored study of this search, if there is one; UserError where it asks another question."""
    key = resolved(search, data, storage).key(data)
    if key not in optuna.get_all_study_names(storage):
        return None
    study = optuna.load_study(study_name=key, storage=storage)
    if "fingerprint" not in study.user_attrs:  # a start that was killed: nothing was asked yet
        return None
    check_same(key, json.loads(study.user_attrs["fingerprint"]), search.fingerprint(data), search.version)
    return study


def our_studies(storage: RDBStorage) -> list[optuna.Study]:
    """Every stored study that was made here."""
    found = [optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage)]
    return [study for study in found if "fingerprint" in study.user_attrs]


class StudyLock:
    """One command at a time for a study, on whatever machine: a lock that PostgreSQL holds as long as the connection lives.

    UserError where another has it. Of SQLite, which is for one machine, nothing is asked: `guard.alone` sees to that.
    """

    def __init__(self, storage: RDBStorage, key: str):
        self._key = key
        self._number = int.from_bytes(hashlib.sha256(f"pipeline {key}".encode()).digest()[:8], "big", signed=True)
        self._engine = create_engine(storage.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        self._connection: Connection | None = None
        if self._engine.dialect.name == "postgresql":
            self._connection = self._acquire()

    def close(self) -> None:
        """Give it back."""
        if self._connection:
            with contextlib.suppress(DBAPIError):
                self._connection.close()
            self._connection = None

    def check(self) -> None:
        """Take it again where the connection was lost; UserError where another command was faster."""
        if self._engine.dialect.name != "postgresql":
            return
        try:
            if self._connection:
                self._connection.execute(text("SELECT 1"))
            else:
                self._connection = self._acquire()
        except DBAPIError:  # the database is away: at the next check it may be back
            self.close()

    def _acquire(self) -> Connection:
        connection = self._engine.connect()
        taken = connection.execute(text("SELECT pg_try_advisory_lock(:number)"), {"number": self._number}).scalar()
        if not taken:
            connection.close()
            raise UserError(
                f"study {self._key}: another command is running it, maybe on another machine; wait for it, or stop it"
            )
        return connection


def num_finished(study: optuna.Study) -> int:
    """How many trials count against the budget."""
    return sum(counts_toward_budget(trial) for trial in study.get_trials(deepcopy=False))
