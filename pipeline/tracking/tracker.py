"""The only opener of MLflow runs: an experiment per study, a parent run for the study, a child run per trial."""

import contextlib
import json
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pipeline.runtime  # noqa: F401, before MLflow

# isort: split
from filelock import FileLock
from mlflow.entities import Run as StoredRun
from mlflow.entities import RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError, first_line, redact_uri
from pipeline.processes import process_has_exited
from pipeline.recipe import Recipe
from pipeline.tracking.journal import FOLDER, Busy, Journal, address_of, is_busy, journals, remains
from pipeline.tracking.kept import left_out, whole
from pipeline.tracking.lineage import code, hardware
from pipeline.tracking.relocate import check_place
from pipeline.tracking.run import MlflowRun, State, end_record, now_ms
from pipeline.tracking.server import shared_view
from pipeline.tracking.store import RUN_KEY, Deleted, RunStore, client_of, connect, is_active
from pipeline.tracking.uploader import DELETED, Uploader
from pipeline.training.resume import CHECKPOINTS

for _noisy in ("mlflow", "alembic", "urllib3"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it prints the traceback of what it raises


log = logging.getLogger(__name__)

_PLACES = "data_places"  # the tag of a study's run: JSON
_LONGEST_TAG = 8_000  # characters; MLflow cuts longer ones without a word
_PATIENCE_S = 30.0  # for another process that ships a run's journal just now


@dataclass(frozen=True)
class StudyRuns:
    """Where a study's runs are in MLflow, and the metric that ranks them."""

    name: str
    parent: str
    experiment: str
    objective: str
    view: str | None  # the key of its view in the UI
    places: Sequence[str] = ()  # where its data set lay, the newest first


class OwnershipLost(Exception):
    """A run's trial belongs to another process by now: nothing more may be logged, and it isn't ours to end."""


class Run(Protocol):
    """An open run. `key` names it from the first moment, MLflow's `id` is None as long as MLflow has not answered."""

    @property
    def key(self) -> str: ...

    @property
    def id(self) -> str | None: ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """One batch of finite numbers; `step` is an epoch, from 1. Of a name's steps each is kept once, the first time."""

    def log_files(self, folder: Path) -> None:
        """Every file of a folder becomes an artifact."""

    def end(self, state: State, reason: str = "") -> None:
        """Close the run; the first call counts."""


class Tracker(Protocol):
    """Where runs are remembered: MLflow, or nowhere."""

    def run(
        self,
        name: str,
        recipe: Recipe,
        data: TrainingData,
        parent: str | None = None,
        tags: Mapping[str, str] | None = None,
        key: str | None = None,
        check_ownership: Callable[[], None] = lambda: None,
    ) -> contextlib.AbstractContextManager[Run]:
        """A run that is never left open: one that its user didn't end is FAILED when the block is left.

        Where a `key` is given that is known, the same run is gone on with. `check_ownership` is called before anything
        is logged, and raises OwnershipLost where the run belongs to another process by now.
        """


class NullTracker:
    """Remembers nothing; for measurements of the training alone."""

    @contextlib.contextmanager
    def run(
        self,
        name: str,
        recipe: Recipe,
        data: TrainingData,
        parent: str | None = None,
        tags: Mapping[str, str] | None = None,
        key: str | None = None,
        check_ownership: Callable[[], None] = lambda: None,
    ) -> Iterator[Run]:
        """See Tracker."""
        yield _NullRun(key or uuid.uuid4().hex)


class _NullRun:
    id = None

    def __init__(self, key: str):
        self.key = key

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...
    def log_files(self, folder: Path) -> None: ...
    def end(self, state: State, reason: str = "") -> None: ...


@dataclass(frozen=True)
class Left:
    """The journals in a home folder that other processes made, by their run keys."""

    free: Sequence[str]  # of dead processes
    busy: Sequence[str]  # of living ones
    elsewhere: Mapping[str, str]  # made for another tracker -> its address


class MlflowTracker:
    """Runs in an MLflow store: `mlflow.db` in the home folder, another database, or a tracking server.

    What runs measure goes to a journal in the home folder first and is sent by a thread, so they never wait for MLflow and
    lose nothing where it is away; see journal.py and shipping.py. Raises UserError where the store can't be opened, at
    once; reading from a store that fails later raises MLflow's exceptions.
    """

    def __init__(self, home: Path, uri: str | None = None, asks: bool = True):
        """With `asks` false the store is not looked at: one who starts in mid-study may come while it is away."""
        self.home = home
        own = home.resolve() / "mlflow.db"
        default = f"sqlite:///{own}"
        self.uri = uri or default
        self.address = "mlflow.db" if self.uri == default else self.uri  # of the journals; without secrets
        if not self.address.startswith("sqlite"):
            self.address = redact_uri(self.address)
        way_out = "leave TRACKING_URI out to keep runs in mlruns/mlflow.db" if uri else "move that file away"
        self.is_remote = self.uri.startswith("http")  # a server, which keeps the artifacts too
        artifacts = None if self.is_remote else (home.resolve() / "artifacts").as_uri()
        self._lock = FileLock(home / "mlflow.lock")
        try:
            home.mkdir(parents=True, exist_ok=True)
            with self._lock:  # several processes that create the tables at once break a database for good
                self.client = connect(self.uri, own if self.uri == default else None) if asks else client_of(self.uri)
        except Exception as error:  # whatever a driver raises: the address is the user's
            raise UserError(
                f"TRACKING_URI {redact_uri(self.uri)}: can't be opened ({first_line(error, self.uri)}); mend it, or {way_out}"
            ) from None
        if asks and self.uri == default:
            check_place(home)
        self._stores = RunStore(self.client, self.uri, artifacts, self._lock)
        self._shipper = Uploader(self._stores)
        self._damaged: dict[str, str] = {}  # what others left and can't be read

    def experiment(self, name: str) -> str:
        """The id of the experiment of this name, made where there is none."""
        return self._stores.experiment(name)

    def open_study(
        self,
        name: str,
        note: str,
        objective: str,
        params: Sequence[str],
        run_id: str | None = None,
        key: str | None = None,
        places: Sequence[str] = (),
    ) -> "MlflowRun":
        """A study's parent run, RUNNING: the one of this id or key, or a new one; `params` are those that it searches.

        `places` are those where its data set lay, the newest first; they replace those that it has.

        The study itself remembers id and key: others may have one of the same name in a shared store, and who dies before it
        knows the id has made the run. Where that run was deleted in MLflow there is a new one, with a key of its own, to
        which the study's other runs belong from now on. Tags that were removed are written again. MLflow has answered when
        it returns: the run's `id` is there. UserError where MLflow does not, or the study's experiment was deleted.
        """
        try:
            former = self._stores.run(run_id) if run_id else None
            found = former if former and is_active(former) else None
            experiment = self._place(name, former)
            if key and not run_id:
                found = self._found(experiment, key)
            view_key, view = shared_view(objective, params)
            self.client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{view_key}", view)
            is_new = found is None
            if is_new and run_id:
                key = None
            key = key or (found and found.data.tags.get(RUN_KEY)) or uuid.uuid4().hex
            tags = {"study": name, "role": "study", "objective": objective, "view": view_key, RUN_KEY: key}
            if found is None:
                first = tags | _provenance() | {"mlflow.note.content": note}
                if run_id:
                    first[_REPLACES] = ",".join([run_id, *(_replaced(former) if former else ())])
                    log.warning("the study's own run %s was deleted in MLflow: another takes its place", run_id)
                opened = self._stores.make(experiment, name, first, now_ms())
            else:
                opened, name = found.info.run_id, found.info.run_name or name  # a person's name for it stays
            self._adopt(opened)
            self.keep_places(opened, places)
            self.client.update_run(opened, "RUNNING")
        except MlflowException as error:
            raise UserError(
                f"TRACKING_URI {redact_uri(self.uri)}: doesn't answer ({first_line(error)}); try again"
            ) from None
        start = {"run_id": opened, "name": name, "tags": tags, "params": {}}
        return MlflowRun(self._shipper, self._journal(key, start, not is_new), opened)

    def keep_places(self, run_id: str, places: Sequence[str]) -> None:
        """Where a study's data set lay, the newest first, in its run; as many as a tag holds."""
        while len(text := json.dumps(list(places))) > _LONGEST_TAG:
            places = places[:-1]
        self.client.set_tag(run_id, _PLACES, text)

    def places_of(self, run_id: str) -> list[str]:
        """Where a run's data set lay, the newest first: what its study has kept, then where MLflow has it, the first place."""
        run = self._stores.run(run_id)
        if run is None or not is_active(run):
            return []
        study = self._stores.run(run.data.tags.get(MLFLOW_PARENT_RUN_ID, run_id))
        sources = [
            json.loads(its.dataset.source).get("uri", "") for its in (run.inputs.dataset_inputs if run.inputs else [])
        ]
        return list(dict.fromkeys([*(_places(study) if study else ()), *filter(os.path.isabs, sources)]))

    def _found(self, experiment: str, key: str) -> StoredRun | None:
        try:
            return self._stores.find(experiment, key)
        except Deleted:
            return None

    def _place(self, name: str, former: StoredRun | None) -> str:
        """The experiment of a study's run: where it is or was, whatever that is called by now; else the one of its name."""
        if former and self._stores.is_experiment_active(former.info.experiment_id):
            return former.info.experiment_id
        return self.experiment(name)

    def _adopt(self, parent: str) -> None:
        """The runs of those that a study's run replaces are its own from now on; such as were restored since, too."""
        run = self.client.get_run(parent)
        strays = [
            child for former in _replaced(run) for child in self._search(run.info.experiment_id, _child_of(former))
        ]
        for child in strays:
            self.client.set_tag(child.info.run_id, MLFLOW_PARENT_RUN_ID, parent)
        if strays:
            log.warning("the study's run %s has %d runs of one that was deleted in MLflow", parent, len(strays))

    def _search(
        self,
        experiment: str,
        query: str,
        order: Sequence[str] = (),
        view: int = ViewType.ACTIVE_ONLY,
        at_once: int = 5_000,
    ) -> Iterator[StoredRun]:
        """Every run that a query finds, `at_once` so many asked for: MLflow gives them by pages."""
        page = None
        while True:
            runs = self.client.search_runs(
                [experiment], query, view, max_results=at_once, order_by=list(order), page_token=page
            )
            yield from runs
            page = runs.token
            if not page:
                return

    @contextlib.contextmanager
    def run(
        self,
        name: str,
        recipe: Recipe,
        data: TrainingData,
        parent: str | None = None,
        tags: Mapping[str, str] | None = None,
        key: str | None = None,
        check_ownership: Callable[[], None] = lambda: None,
    ) -> Iterator["MlflowRun"]:
        """See Tracker; with `parent`, a child of that run in its experiment.

        Raises UserError where another process has the run of this key, or the disk takes no journal.
        """
        all_tags = {
            "recipe_digest": recipe.digest(),
            "data_digest": data.digest,
            "split_digest": data.split_digest,
            **_provenance(),
            **({MLFLOW_PARENT_RUN_ID: parent} if parent else {}),
            **(tags or {}),
        }
        start = {
            "experiment": data.name,
            "name": name,
            "tags": all_tags,
            "params": {n: json.dumps(v) if isinstance(v, tuple) else str(v) for n, v in recipe.flat().items()},
            "data": _dataset(data),
        }
        journal = self._journal(key or uuid.uuid4().hex, start, key is not None)
        run = MlflowRun(self._shipper, journal, check_ownership=check_ownership)
        try:
            run.start(recipe, self.uri)
            yield run
        except OwnershipLost:
            run.leave()
            raise
        except BaseException as error:
            with contextlib.suppress(UserError):  # of a full disk, which is told by the first one
                run.close(State.FAILED, repr(error))
            raise
        finally:
            run.stop_monitor()
        run.end(State.FAILED, "ended without a state")

    def _journal(self, key: str, start: Mapping[str, Any], is_known: bool) -> Journal:
        assert re.fullmatch("[0-9a-f]{32}", key), key  # it names a folder
        first = {"kind": "start", "address": self.address, "time": now_ms(), **start}
        try:
            return self._shipper.open(self.home / FOLDER / key, first, is_known, _PATIENCE_S)
        except Busy:
            raise UserError(f"run key {key}: another process is writing or sending this run; wait for it") from None

    def flush(self, timeout_s: float) -> bool:
        """Wait until MLflow has all that this process measured; False where it has not by then, or refuses some of it."""
        return self._shipper.flush(timeout_s)

    @property
    def waiting(self) -> Sequence[str]:
        """The keys of this process's runs of which something is not in MLflow yet, refused ones too."""
        return self._shipper.waiting

    @property
    def refused(self) -> Mapping[str, str]:
        """Run key -> why MLflow will never take what is in its journal."""
        return self._shipper.refused | self._damaged

    @property
    def failing_s(self) -> float:
        """For so long MLflow has not answered the sending thread; 0 where it does."""
        return self._shipper.failing_s

    def id_of(self, key: str, timeout_s: float = 60.0) -> str:
        """MLflow's id of a run of this process, when all of the process is in MLflow; UserError where that takes too long."""
        self.flush(timeout_s)
        if key not in self.waiting and (found := self._shipper.run_id(key)):  # others may be refused
            return found
        reason = self.refused.get(key)
        if key in self._shipper.deleted:
            raise UserError(f"run key {key}: {DELETED} before it was whole; the same command makes it anew")
        raise UserError(
            f"run key {key}: MLflow refuses it ({reason})"
            if reason
            else f"run key {key}: waits in {self.home / FOLDER}, MLflow doesn't answer; the same command goes on when it does"
        )

    def left(self) -> Left:
        """The journals of other processes."""
        own = set(self._shipper.keys)
        theirs = [folder for folder in journals(self.home) if folder.name not in own]
        busy = [folder.name for folder in theirs if is_busy(folder)]
        addresses = {folder.name: address_of(folder) for folder in theirs if folder.name not in busy}
        elsewhere = {key: its for key, its in addresses.items() if its and its != self.address}
        return Left([key for key in addresses if key not in elsewhere], busy, elsewhere)

    def adopt_journals(self) -> int:
        """Send what dead processes left here for this tracker, their open runs as interrupted; how many runs.

        It is sent in the background; `flush` waits for it.
        """
        for folder in remains(self.home):
            with contextlib.suppress(Busy, UserError):  # Busy: since; UserError: of a full disk
                Journal(folder).remove()
        taken = 0
        for key in self.left().free:
            try:
                journal = Journal(self.home / FOLDER / key)
            except Busy:  # since
                continue
            except UserError as error:
                self._damaged[key] = str(error)
                continue
            if not journal.size or journal.is_left:
                journal.remove()  # its process died before its first record was whole; or another has gone on with the run
                continue
            if not journal.has_ended:
                journal.append(end_record(State.INTERRUPTED, "its process is gone"), durable=True)
            self._shipper.adopt(journal)
            taken += 1
        return taken

    def drop_deleted(self) -> list[str]:
        """Throw away what waits here for runs that were deleted in MLflow, their kept trainings too; their keys."""
        dropped = []
        for key in self._shipper.deleted:
            with contextlib.suppress(Busy):
                Journal(self.home / FOLDER / key).remove()
                shutil.rmtree(self.home / CHECKPOINTS / key, ignore_errors=True)
                self._shipper.forget(key)
                dropped.append(key)
        return dropped

    @property
    def deleted(self) -> set[str]:
        """Of the refused runs, the keys of those that were deleted in MLflow."""
        return self._shipper.deleted

    def studies(self) -> list["StudyRuns"]:
        """The studies in this store, the last one run first."""
        found = []
        for experiment in self.client.search_experiments(max_results=1000):
            for parent in whole(self._search(experiment.experiment_id, "tags.role = 'study'")):
                tags, info = parent.data.tags, parent.info
                ended = float("inf") if info.status == "RUNNING" else info.end_time  # one opened again has both
                names = (tags["study"], info.run_id, info.experiment_id, tags["objective"], tags.get("view"))
                study = StudyRuns(*names, _places(parent))
                found.append((ended, study))
        return [study for _, study in sorted(found, key=lambda item: -item[0])]

    def best_run_ids(self, study: "StudyRuns", count: int) -> list[str]:
        """The finished trials' runs, best first; not those of finals and reproductions."""
        query = f"{_child_of(study.parent, 'trial')} and tags.state = 'finished'"
        found = whole(self._search(study.experiment, query, [f"metrics.`{study.objective}` DESC"], at_once=count + 10))
        return [run.info.run_id for run in islice(found, count)]

    def close_lost(self, parent: str, alive: Collection[str], ended: Mapping[str, tuple[State, str]]) -> None:
        """Close a study's RUNNING runs that no process is at: not those with a key in `alive`, nor with a journal here.

        `ended` tells, by key, how the trials of some ended; of the others the process is gone.
        """
        experiment = self.client.get_run(parent).info.experiment_id
        query = f"{_child_of(parent, 'trial')} and attributes.status = 'RUNNING'"
        for run in self.client.search_runs([experiment], query, max_results=50_000):
            key = run.data.tags.get(RUN_KEY, "")
            if key not in alive and not (key and (self.home / FOLDER / key).exists()):
                self.close(run, *ended.get(key, (State.INTERRUPTED, "its process is gone")))

    def end_run(self, key: str, parent: str, name: str, tags: Mapping[str, str], state: State, reason: str) -> None:
        """End, as soon as MLflow answers, the run of a process that is gone, and that nobody will go on with."""
        tags = {MLFLOW_PARENT_RUN_ID: parent, **tags}
        try:
            journal = self._journal(key, {"name": name, "tags": tags, "params": {}}, True)
            journal.append(end_record(state, reason), durable=True)
        except UserError as error:
            log.warning("%s can't be ended in MLflow (%s); make audit tells and mends it", name, error)
        self._shipper.hurry()

    def _settle(self) -> None:
        self.adopt_journals()
        self.flush(60)

    def close(self, run: StoredRun, state: State = State.INTERRUPTED, reason: str = "its process is gone") -> None:
        """A run that has no journal."""
        end = end_record(state, reason)
        tags = [RunTag(name, value) for name, value in end["tags"].items()]
        self.client.log_batch(run.info.run_id, tags=tags)
        self.client.set_terminated(run.info.run_id, end["status"])

    def children(self, study: "StudyRuns", role: str | None = None) -> list[StoredRun]:
        """A study's runs with this tag `role` (trial, final, reproduction), or all, as MLflow has them, the oldest first.

        Not those that `left_out` tells of.
        """
        return list(whole(self._search(study.experiment, _child_of(study.parent, role), _OLDEST_FIRST)))

    def deleted_children(self, study: "StudyRuns") -> list[StoredRun]:
        """A study's runs that were deleted in MLflow, and are still there to be restored."""
        return self._deleted_of(study.parent)

    def deleted_keys(self, parent: str) -> set[str]:
        """The keys of a study's runs that were deleted in MLflow; `parent` is the study's own."""
        return {run.data.tags[RUN_KEY] for run in self._deleted_of(parent) if RUN_KEY in run.data.tags}

    def _deleted_of(self, parent: str) -> list[StoredRun]:
        run = self.client.get_run(parent)
        queries = [_child_of(name) for name in (parent, *_replaced(run))]
        place, view = run.info.experiment_id, ViewType.DELETED_ONLY
        return [child for query in queries for child in self._search(place, query, _OLDEST_FIRST, view)]

    def left_out(self, study: "StudyRuns") -> list[str]:
        """A line for what of a study was deleted in MLflow, and for what lost its tags: no command reads those runs."""
        runs = list(self._search(study.experiment, _child_of(study.parent)))
        return left_out(runs, self.deleted_children(study), self._stores.way_back(study.experiment))

    def find(self, run_id: str) -> StoredRun | None:
        """The run of this id, deleted or not; None where there is none, or none any more."""
        return self._stores.run(run_id)

    def way_back(self, experiment: str) -> str:
        """How a person restores a deleted run of this experiment."""
        return self._stores.way_back(experiment)

    def deleted_studies(self) -> dict[str, str]:
        """The names of studies that were deleted in MLflow -> how a person restores each."""
        found = {}
        for experiment in self.client.search_experiments(ViewType.ALL, max_results=1000):
            place = experiment.experiment_id
            for run in whole(self._search(place, "tags.role = 'study'", view=ViewType.DELETED_ONLY)):
                found[run.data.tags["study"]] = self._stores.way_back(place)
        return found

    def close_gone(self, experiment: str) -> None:
        """Close what processes of this machine left RUNNING: runs with a tag `worker`, as finals' have.

        What they left in their journals is sent first.
        """
        self._settle()
        for run in self.client.search_runs([experiment], "attributes.status = 'RUNNING'", max_results=50_000):
            worker = run.data.tags.get("worker")
            if worker and process_has_exited(json.loads(worker)):
                self.close(run)

    def read_file(self, run_id: str, name: str) -> bytes | None:
        """An artifact's bytes; None where the run has none of this name."""
        if name not in {file.path for file in self.client.list_artifacts(run_id)}:
            return None
        with tempfile.TemporaryDirectory() as folder:
            return Path(self.client.download_artifacts(run_id, name, folder)).read_bytes()


_REPLACES = "replaces"  # a tag of a study's run: the ids of those before it, which were deleted


def _replaced(parent: StoredRun) -> list[str]:
    return re.findall(r"[0-9a-f]{32}", parent.data.tags.get(_REPLACES, ""))


_OLDEST_FIRST = ("attributes.start_time ASC",)


def _places(study: StoredRun) -> list[str]:
    """The places in the tag of a study's run; none where a person has spoilt it."""
    try:
        kept = json.loads(study.data.tags.get(_PLACES, "[]"))
    except ValueError:
        return []
    return [place for place in kept if isinstance(place, str)] if isinstance(kept, list) else []


def _child_of(parent: str, role: str | None = None) -> str:
    return f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}'" + (f" and tags.role = '{role}'" if role else "")


def _provenance() -> dict[str, str]:
    """Tags of every run: which code, on what."""
    import getpass
    import socket

    import torch

    return {
        "mlflow.user": getpass.getuser(),
        "mlflow.source.name": "python -m pipeline",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": code().commit,
        "git_dirty": str(code().dirty).lower(),
        "host": socket.gethostname(),
        "hardware": "; ".join(hardware()),
        "torch": torch.__version__,
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
