"""The only opener of MLflow runs: an experiment per study, a parent run for the study, a child run per trial."""

import contextlib
import enum
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# A server that refuses is reported after 13 s, a silent one after 2 minutes; MLflow's own patience is 4 minutes a call.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
os.environ.setdefault("PGCONNECT_TIMEOUT", "10")  # seconds; PostgreSQL's own is 2 minutes

import mlflow
from filelock import FileLock
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.entities import Run as StoredRun
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError, public_uri, without_secrets
from pipeline.guard import is_gone
from pipeline.recipe import Recipe
from pipeline.tracking.lineage import code, environment, hardware
from pipeline.tracking.sqlite import use_write_ahead_log
from pipeline.tracking.ui import shared_view

for _noisy in ("mlflow", "alembic", "urllib3"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)


class State(enum.StrEnum):
    """How a run ended, kept in its tag `state`; MLflow has no word for a pruned one."""

    FINISHED = "finished"
    PRUNED = "pruned"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


_STATUS = {
    State.FINISHED: "FINISHED",
    State.PRUNED: "KILLED",
    State.FAILED: "FAILED",
    State.INTERRUPTED: "KILLED",
}
_TAG_LIMIT = 5000  # characters; MLflow cuts longer ones silently


@dataclass(frozen=True)
class StudyRuns:
    """Where a study's runs are in MLflow, and the metric that ranks them."""

    name: str
    parent: str
    experiment: str
    objective: str
    view: str | None  # the key of its view in the UI


class Run(Protocol):
    """An open run."""

    id: str

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """One batch of finite numbers; `step` is an epoch, from 1."""

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
    ) -> contextlib.AbstractContextManager[Run]:
        """A run that is never left open: one that its user didn't end is FAILED when the block is left."""


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
    ) -> Iterator[Run]:
        """See Tracker."""
        yield _NullRun()


class _NullRun:
    id = ""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...
    def log_files(self, folder: Path) -> None: ...
    def end(self, state: State, reason: str = "") -> None: ...


class MlflowTracker:
    """Runs in an MLflow store: `mlflow.db` in the home folder, another database, or a tracking server.

    Raises UserError where the store can't be opened; a store that fails later raises MLflow's exceptions.
    """

    def __init__(self, home: Path, uri: str | None = None):
        self.uri = uri or f"sqlite:///{home.resolve() / 'mlflow.db'}"
        way_out = "leave TRACKING_URI out to keep runs in mlruns/mlflow.db" if uri else "move that file away"
        self.is_remote = self.uri.startswith("http")  # a server, which keeps the artifacts too
        self._artifacts = None if self.is_remote else (home.resolve() / "artifacts").as_uri()
        self._lock = FileLock(home / "mlflow.lock")
        try:
            home.mkdir(parents=True, exist_ok=True)
            # Several processes that create the tables at once break a database for good.
            with self._lock:
                if not self.is_remote:
                    _connect_once(self.uri)
                self.client = mlflow.MlflowClient(self.uri)
                self.client.search_experiments(max_results=1)
        except Exception as error:  # whatever a driver raises: the address is the user's
            raise UserError(
                f"TRACKING_URI {public_uri(self.uri)}: can't be opened ({_first_line(error)}); mend it, or {way_out}"
            ) from None

    def experiment(self, name: str) -> str:
        """The id of the experiment of this name, made where there is none."""
        found = self.client.get_experiment_by_name(name)
        if found and found.lifecycle_stage == "deleted":
            raise UserError(
                f"the MLflow experiment {name} was deleted: restore it in the UI, or give the study another VERSION"
            )
        if found:
            return found.experiment_id
        return self.client.create_experiment(
            name, self._artifacts, tags={"mlflow.experimentKind": "custom_model_development"}
        )

    def open_study(
        self, name: str, note: str, objective: str, params: Sequence[str], run_id: str | None = None
    ) -> "MlflowRun":
        """A study's parent run, RUNNING: the one of this id, or a new one; `params` are those that it searches.

        The study itself remembers the id: others may have one of the same name in a shared store.
        """
        with self._lock:  # two commands at once would each make the experiment
            experiment = self.experiment(name)
        key, view = shared_view(objective, params)
        self.client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{key}", view)
        if run_id and self._is_there(run_id):
            self.client.update_run(run_id, status="RUNNING")
            return MlflowRun(self.client, run_id)
        tags = {"study": name, "role": "study", "objective": objective, "view": key, "mlflow.note.content": note}
        made = self.client.create_run(experiment, tags=_provenance() | tags, run_name=name)
        return MlflowRun(self.client, made.info.run_id)

    def _is_there(self, run_id: str) -> bool:
        try:
            return self.client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException:
            return False

    @contextlib.contextmanager
    def run(
        self,
        name: str,
        recipe: Recipe,
        data: TrainingData,
        parent: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Iterator["MlflowRun"]:
        """See Tracker; with `parent`, a child of that run in its experiment."""
        experiment = self.client.get_run(parent).info.experiment_id if parent else self.experiment(data.name)
        all_tags = {
            "recipe_digest": recipe.digest(),
            "data_digest": data.digest,
            "split_digest": data.split_digest,
            **_provenance(),
            **({MLFLOW_PARENT_RUN_ID: parent} if parent else {}),
            **(tags or {}),
        }
        run = MlflowRun(self.client, self.client.create_run(experiment, tags=all_tags, run_name=name).info.run_id)
        monitor = None
        try:
            run.start(recipe, data)
            monitor = SystemMetricsMonitor(run.id, sampling_interval=5, tracking_uri=self.uri)
            monitor.start()
            yield run
        except BaseException as error:
            run.end(State.FAILED, repr(error))
            raise
        finally:
            if monitor:
                monitor.finish()
            run.end(State.FAILED, "ended without a state")

    def studies(self) -> list["StudyRuns"]:
        """The studies in this store, the last one run first."""
        found = []
        for experiment in self.client.search_experiments(max_results=1000):
            for parent in self.client.search_runs([experiment.experiment_id], "tags.role = 'study'"):
                tags, info = parent.data.tags, parent.info
                ended = float("inf") if info.status == "RUNNING" else info.end_time  # one opened again has both
                study = StudyRuns(tags["study"], info.run_id, info.experiment_id, tags["objective"], tags.get("view"))
                found.append((ended, study))
        return [study for _, study in sorted(found, key=lambda item: -item[0])]

    def best_run_ids(self, study: "StudyRuns", count: int) -> list[str]:
        """The finished trials' runs, best first; not those of finals and reproductions."""
        found = self.client.search_runs(
            [study.experiment],
            f"{_child_of(study.parent, 'trial')} and tags.state = 'finished'",
            order_by=[f"metrics.`{study.objective}` DESC"],
            max_results=count,
        )
        return [run.info.run_id for run in found]

    def close_abandoned(self, parent: str, abandoned: Collection[int], alive: Collection[int]) -> None:
        """Close the runs of a study's abandoned trials, and any RUNNING one whose trial isn't among the living.

        An abandoned trial's run may have finished: its process died before it could tell. Its trial is asked again.
        """
        experiment = self.client.get_run(parent).info.experiment_id
        for run in self.client.search_runs([experiment], _child_of(parent, "trial"), max_results=50_000):
            number, runs = int(run.data.tags["trial"]), run.info.status == "RUNNING"
            if (number in abandoned and run.data.tags.get("state") != State.INTERRUPTED) or (
                runs and number not in alive
            ):
                MlflowRun(self.client, run.info.run_id).end(State.INTERRUPTED, "its process is gone")

    def children(self, study: "StudyRuns", role: str | None = None) -> list[StoredRun]:
        """A study's runs with this tag `role` (trial, final, reproduction), or all, as MLflow has them, the oldest first."""
        found: list[StoredRun] = []
        query, order, page = _child_of(study.parent, role), ["attributes.start_time ASC"], None
        while True:
            runs = self.client.search_runs(
                [study.experiment], query, order_by=order, max_results=5_000, page_token=page
            )
            found += runs
            page = runs.token
            if not page:
                return found

    def close_gone(self, experiment: str) -> None:
        """Close what processes of this machine left RUNNING: runs with a tag `worker`, as finals' have."""
        for run in self.client.search_runs([experiment], "attributes.status = 'RUNNING'", max_results=50_000):
            worker = run.data.tags.get("worker")
            if worker and is_gone(json.loads(worker)):
                MlflowRun(self.client, run.info.run_id).end(State.INTERRUPTED, "its process is gone")

    def read_file(self, run_id: str, name: str) -> bytes | None:
        """An artifact's bytes; None where the run has none of this name."""
        if name not in {file.path for file in self.client.list_artifacts(run_id)}:
            return None
        with tempfile.TemporaryDirectory() as folder:
            return Path(self.client.download_artifacts(run_id, name, folder)).read_bytes()


def _child_of(parent: str, role: str | None = None) -> str:
    return f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}'" + (f" and tags.role = '{role}'" if role else "")


class MlflowRun:
    """An open run in MLflow; see Run."""

    def __init__(self, client: mlflow.MlflowClient, run_id: str):
        self.id = run_id
        self._client = client
        self._open = True

    def start(self, recipe: Recipe, data: TrainingData) -> None:
        """What is known before the first step: parameters, data set, code and environment."""
        params = [Param(name, json.dumps(v) if isinstance(v, tuple) else str(v)) for name, v in recipe.flat().items()]
        self._client.log_batch(self.id, params=params)
        self._client.log_inputs(self.id, datasets=[_dataset_input(data)])
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "recipe.json").write_text(recipe.to_json() + "\n")
            (Path(folder) / "environment.txt").write_text(environment())
            if code().dirty:
                (Path(folder) / "diff.patch").write_bytes(code().diff)
            self.log_files(Path(folder))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """See Run. Infinity would be stored as 1.8e308 and win every comparison, so it is refused here."""
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(f"not a finite number: {', '.join(bad)}")
        now = int(time.time() * 1000)
        self._client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

    def log_files(self, folder: Path) -> None:
        """See Run."""
        self._client.log_artifacts(self.id, str(folder))

    def end(self, state: State, reason: str = "") -> None:
        """See Run."""
        if self._open:
            self._open = False
            tags = {"state": str(state)} | ({"reason": without_secrets(reason)[:_TAG_LIMIT]} if reason else {})
            self._client.log_batch(self.id, tags=[RunTag(name, value) for name, value in tags.items()])
            self._client.set_terminated(self.id, _STATUS[state])


def _connect_once(uri: str) -> None:
    """Fail at once where MLflow would try for 100 s; and set SQLite's write-ahead log."""
    from sqlalchemy import create_engine

    engine = create_engine(uri)
    try:
        engine.connect().close()
        use_write_ahead_log(engine)
    finally:
        engine.dispose()


def _provenance() -> dict[str, str]:
    """Tags of every run: which code, on what."""
    import getpass
    import socket

    import torch

    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in containers
        user = str(os.getuid())
    return {
        "mlflow.user": user,
        "mlflow.source.name": "python -m pipeline",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": code().commit,
        "git_dirty": str(code().dirty).lower(),
        "host": socket.gethostname(),
        "hardware": "; ".join(hardware()),
        "torch": torch.__version__,
    }


def _dataset_input(data: TrainingData) -> DatasetInput:
    """The data set as MLflow shows it, with our own digest over every pixel (MLflow's reads the first 10,000 numbers)."""
    shape = {"images": list(data.train.images.shape[1:]), "classes": list(data.classes)}
    profile = {"num_train": len(data.train.labels), "num_validation": len(data.validation.labels)}
    dataset = Dataset(
        name=data.name,
        digest=data.digest[:36],  # the column's width
        source_type="local",
        source=json.dumps({"uri": data.source}),
        schema=json.dumps(shape),
        profile=json.dumps(profile | {"split_digest": data.split_digest}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def _first_line(error: BaseException) -> str:
    return without_secrets((str(error).strip().splitlines() or [type(error).__name__])[0])[:300]
