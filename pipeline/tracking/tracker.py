"""The only opener of MLflow runs: an experiment per study, a parent run for the study, a child run per trial.

What is in MLflow is read by queries.py; what other processes left behind is recovered by recovery.py.
"""

import contextlib
import json
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import pipeline.runtime  # noqa: F401, before MLflow

# isort: split
from filelock import FileLock
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError, first_line, redact_uri
from pipeline.models.build import weights_digest
from pipeline.processes import this_process
from pipeline.recipe import Recipe
from pipeline.tracking.journal import FOLDER, Busy, Journal
from pipeline.tracking.lineage import code, hardware
from pipeline.tracking.relocate import check_place
from pipeline.tracking.run import TAG_LIMIT, MlflowRun, now_ms
from pipeline.tracking.run_id import is_run_id
from pipeline.tracking.server import shared_view
from pipeline.tracking.store import Deleted, RunStore, client_of, connect, is_active
from pipeline.tracking.tags import RunTags, State, StoredRun
from pipeline.tracking.uploader import DELETED, Uploader

for _noisy in ("mlflow", "alembic", "urllib3"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it prints the traceback of what it raises


log = logging.getLogger(__name__)

_GIVE_UP_S = 30.0  # MLflow has not answered for so long
_LOCK_TIMEOUT_S = 30.0  # for another process that sends a run's journal


class OwnershipLost(Exception):
    """A run's trial belongs to another process by now: nothing more may be logged, and the run isn't ours to end."""


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """What a run is to be: of which recipe and data, and whose child."""

    name: str  # in MLflow
    recipe: Recipe
    data: TrainingData
    parent_run: str | None = None  # whose child the run is, in its experiment
    tags: RunTags = field(default_factory=RunTags)
    run_key: str | None = None  # of the run that is to be resumed, or made with this key
    # Called before anything is logged; raises OwnershipLost where the run belongs to another process by now.
    check_ownership: Callable[[], None] = lambda: None


class Run(Protocol):
    """An open run. `key` names it from the first moment, MLflow's `id` is None as long as MLflow has not answered."""

    @property
    def key(self) -> str: ...

    @property
    def id(self) -> str | None: ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """One batch of finite numbers; `step` is an epoch, from 1. A metric keeps the first value of each step."""

    def log_files(self, folder: Path) -> None:
        """Every file of a folder becomes an artifact."""

    def end(self, state: State, reason: str = "") -> None:
        """Close the run; the first call counts."""


class Tracker(Protocol):
    """Where runs are tracked: MLflow, or nowhere."""

    def run(self, request: RunRequest) -> contextlib.AbstractContextManager[Run]:
        """A run that is never left open: one that its user didn't end is FAILED when the block is left.

        Where its `run_key` is known, the same run is resumed. After OwnershipLost the run is left as it is.
        """


class NullTracker:
    """Tracks nothing; for measurements of the training alone."""

    @contextlib.contextmanager
    def run(self, request: RunRequest) -> Iterator[Run]:
        """See Tracker."""
        yield _NullRun(request.run_key or uuid.uuid4().hex)


class _NullRun:
    id = None

    def __init__(self, key: str):
        self.key = key

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...
    def log_files(self, folder: Path) -> None: ...
    def end(self, state: State, reason: str = "") -> None: ...


class MlflowTracker:
    """Runs in an MLflow store: `mlflow.db` in the folder mlruns, another database, or a tracking server.

    What runs measure goes to a journal in the folder mlruns first and is sent by a thread, so they never wait for MLflow and
    lose nothing in an outage; see journal.py and uploader.py. Raises UserError at once where the store can't be opened;
    reading from a store that fails later raises MLflow's exceptions.
    """

    def __init__(self, home: Path, uri: str | None = None, connect_now: bool = True):
        """Without `connect_now` the store need not answer: a worker may start during an outage."""
        self.home = home
        own = home.resolve() / "mlflow.db"
        default = f"sqlite:///{own}"
        is_own = uri is None or (uri.startswith("sqlite:///") and Path(uri.removeprefix("sqlite:///")).resolve() == own)
        self.uri = default if is_own or not uri else uri
        self.address = "mlflow.db" if self.uri == default else self.uri  # of the journals; without secrets
        if not self.address.startswith("sqlite"):
            self.address = redact_uri(self.address)
        self.is_remote = self.uri.startswith("http")  # a server, which keeps the artifacts too
        artifacts = None if self.is_remote else (home.resolve() / "artifacts").as_uri()
        lock = FileLock(home / "mlflow.lock")
        try:
            home.mkdir(parents=True, exist_ok=True)
            with lock:  # several processes that create the tables at once break a database for good
                own_file = own if self.uri == default else None
                self.client = connect(self.uri, own_file) if connect_now else client_of(self.uri)
        except Exception as error:  # whatever a driver raises: the address is the user's
            remedy = "leave `--tracking-uri` out to keep runs in mlruns/mlflow.db" if uri else "move that file away"
            rule = f"can't be opened ({first_line(error, self.uri)})"
            raise UserError(f"`--tracking-uri` {redact_uri(self.uri)}", rule, f"repair it, or {remedy}") from None
        if connect_now and self.uri == default:
            check_place(home)
        self.store = RunStore(self.client, self.uri, artifacts, lock)
        self.uploader = Uploader(self.store)
        self.damaged: dict[str, str] = {}  # run key -> why the journal that another process left can't be read

    def open_study(
        self,
        name: str,
        note: str,
        objective: str,
        params: Sequence[str],
        run_id: str | None = None,
        key: str | None = None,
        places: Sequence[str] = (),
        constraints: Mapping[str, float] | None = None,
        planned_trials: int | None = None,
    ) -> MlflowRun:
        """A study's parent run, RUNNING: the one of this id or key, or a new one; `params` are those that it searches.

        `note` is its question; the experiment gets it as its description, unless it has one.
        `places` are those where its data set lay, the newest first; they and `planned_trials`, how many it is to have in
        all, replace those that the run has.

        The study itself keeps id and key: a shared store may hold another study of the same name, and a process that died
        before it knew the id has created the run. Where that run was deleted in MLflow a new one with a key of its own
        replaces it, and adopts the study's other runs. Tags that were removed are written again. MLflow has answered when
        this returns: the run's `id` is known. UserError where MLflow does not answer, or the study's experiment was deleted.
        """
        try:
            former = self.store.run(run_id) if run_id else None
            experiment = self._experiment_of_study(name, former)
            current = former if former and is_active(former) else None
            if key and not run_id:
                current = self._find_active(experiment, key)
            view_key, view = shared_view(objective, params)
            self.client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{view_key}", view)
            if MLFLOW_RUN_NOTE not in self.client.get_experiment(experiment).tags:  # else a person may have edited it
                self.client.set_experiment_tag(experiment, MLFLOW_RUN_NOTE, note)
            if current is None and run_id:
                key = None
            key = key or (current and RunTags.of(current).run_key) or uuid.uuid4().hex
            own_tags = RunTags(study=name, role="study", objective=objective, view=view_key, run_key=key)
            tags = replace(own_tags, constraints=constraints or None, worker=this_process()).to_mlflow()
            if current is None:
                replaces = (run_id, *((former and RunTags.of(former).replaces) or ())) if run_id else None
                first_tags = tags | _provenance() | RunTags(note=note, replaces=replaces).to_mlflow()
                opened = self.store.create_run(experiment, name, first_tags, now_ms())
                if run_id:
                    log.warning("the study's run %s was deleted in MLflow; run %s replaces it", run_id, opened)
            else:
                opened, name = current.info.run_id, current.info.run_name or name  # it may have been renamed in the UI
            if adopted := self.store.adopt_children(opened):
                log.warning("the study's run %s adopts %d runs of one that was deleted in MLflow", opened, adopted)
            self.set_data_places(opened, places)
            if planned_trials:
                self.store.set_tags(opened, RunTags(planned_trials=planned_trials))
            self.client.update_run(opened, "RUNNING")
        except MlflowException as error:
            rule = f"doesn't answer ({first_line(error)})"
            raise UserError(f"`--tracking-uri` {redact_uri(self.uri)}", rule, "try again") from None
        start = {"run_id": opened, "name": name, "tags": tags, "params": {}}
        return MlflowRun(self.uploader, self.open_journal(key, start, current is not None), opened)

    def set_data_places(self, run_id: str, places: Sequence[str]) -> None:
        """Write into a study's run where its data set lay, the newest first; as many places as a tag holds."""
        while len(json.dumps(list(places))) > TAG_LIMIT:
            places = places[:-1]
        self.store.set_tags(run_id, RunTags(data_places=tuple(places)))

    def _find_active(self, experiment: str, key: str) -> StoredRun | None:
        try:
            return self.store.find(experiment, key)
        except Deleted:
            return None

    def _experiment_of_study(self, name: str, former: StoredRun | None) -> str:
        """The experiment that has or had the study's run, also where it was renamed; else the one of the study's name."""
        if former and self.store.is_experiment_active(former.info.experiment_id):
            return former.info.experiment_id
        return self.store.experiment(name)

    @contextlib.contextmanager
    def run(self, request: RunRequest) -> Iterator[MlflowRun]:
        """See Tracker. Raises UserError where another process has the run of this key, or the disk takes no journal."""
        recipe, data = request.recipe, request.data
        tags = replace(
            request.tags,
            recipe_digest=recipe.digest(),
            data_digest=data.digest,
            split_digest=data.split_digest,
            weights_sha256=weights_digest(recipe),
            test_digest=data.listed.listing.test_digest if data.listed else None,
            parent_run=request.parent_run,
        )
        start = {
            "experiment": data.name,
            "name": request.name,
            "tags": _provenance() | tags.to_mlflow(),
            "params": {n: json.dumps(v) if isinstance(v, tuple) else str(v) for n, v in recipe.flat().items()},
            "data": _dataset(data),
        }
        journal = self.open_journal(request.run_key or uuid.uuid4().hex, start, request.run_key is not None)
        run = MlflowRun(self.uploader, journal, None, request.check_ownership)
        try:
            run.start(recipe, self.uri)
            yield run
            run.end(State.FAILED, "ended without a state")
        except OwnershipLost:
            run.disown()
            raise
        except BaseException as error:
            with contextlib.suppress(UserError):  # of a full disk, which the first error reports
                run.close(State.FAILED, repr(error))
            raise
        finally:
            run.stop_monitor()

    def open_journal(self, key: str, start: Mapping[str, Any], may_exist: bool) -> Journal:
        """The journal of a run, with this start record; `may_exist`: its run may have been created already.

        UserError where another process has it, or the disk can't be written.
        """
        assert is_run_id(key), key  # it names a folder
        record = {"kind": "start", "address": self.address, "time": now_ms(), **start}
        try:
            return self.uploader.open(self.home / FOLDER / key, record, may_exist, _LOCK_TIMEOUT_S)
        except Busy:
            raise UserError(f"run key {key}", "another process is writing or sending this run", "wait for it") from None

    def flush(self, timeout_s: float) -> bool:
        """Wait until MLflow has all that this process measured; False on timeout, or where it rejects some of it."""
        return self.uploader.flush(timeout_s)

    def wait_until_sent(self, give_up_s: float = _GIVE_UP_S, while_waiting: Callable[[], None] = lambda: None) -> bool:
        """`flush` for as long as it takes, also over a slow line; False where MLflow has not answered for `give_up_s`.

        `while_waiting` is called every second.
        """
        while not self.flush(1) and self.unsent and self.outage_s < give_up_s:
            while_waiting()
        return not self.pending

    @property
    def unsent(self) -> set[str]:
        """The keys of this process's runs of which something is still to be sent."""
        return set(self.pending) - set(self.rejected)

    @property
    def pending(self) -> Sequence[str]:
        """The keys of this process's runs of which something is not in MLflow yet, rejected ones too."""
        return self.uploader.pending

    @property
    def rejected(self) -> Mapping[str, str]:
        """Run key -> why MLflow will never accept what is in its journal."""
        return self.uploader.rejected | self.damaged

    @property
    def deleted(self) -> set[str]:
        """Of the rejected runs, the keys of those that were deleted in MLflow."""
        return self.uploader.deleted

    @property
    def outage_s(self) -> float:
        """For so long MLflow has not answered the uploader; 0 where it does."""
        return self.uploader.outage_s

    def id_of(self, key: str, give_up_s: float = _GIVE_UP_S) -> str:
        """MLflow's id of a run of this process, once MLflow has all of the process; see `wait_until_sent`. Else UserError."""
        self.wait_until_sent(give_up_s)
        if key not in self.pending and (run_id := self.uploader.run_id(key)):  # others may be rejected
            return run_id
        subject, reason = f"run key {key}", self.rejected.get(key)
        if key in self.deleted:
            raise UserError(subject, f"{DELETED} before it was complete", "the same command trains it again")
        if reason:
            raise UserError(subject, f"MLflow rejects it ({reason})")
        raise UserError(
            subject,
            f"is pending in {self.home / FOLDER}, as MLflow doesn't answer",
            "`sync` sends it when it does; then repeat the command",
        )


def _provenance() -> dict[str, str]:
    """Tags of every run: which code, on what machine, in which process."""
    import getpass
    import socket

    import torch

    own_tags = RunTags(
        commit=code().commit,
        git_dirty=code().dirty,
        host=socket.gethostname(),
        worker=this_process(),
        hardware="; ".join(hardware()),
        torch=torch.__version__,
    )
    return own_tags.to_mlflow() | {
        "mlflow.user": getpass.getuser(),
        "mlflow.source.name": "python -m pipeline",
        "mlflow.source.type": "LOCAL",
    }


def _dataset(data: TrainingData) -> dict[str, str]:
    """The data set as MLflow shows it, with our own digest over every pixel (MLflow's reads the first 10,000 numbers)."""
    shape = {"images": list(data.train.images.shape[1:]), "classes": list(data.classes)}
    profile = {"num_train": len(data.train.labels), "num_validation": len(data.validation.labels)}
    return {
        "name": data.name,
        "digest": data.digest[:36],  # the column's width
        "source_type": "local",
        "source": json.dumps({"uri": data.source}),
        "schema": json.dumps(shape),
        "profile": json.dumps(profile | {"split_digest": data.split_digest}),
    }
