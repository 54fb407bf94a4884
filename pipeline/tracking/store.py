"""An MLflow store as studies and journals need it: opened at once, its runs made once, its refusals told apart."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow
import requests
from filelock import FileLock
from mlflow.entities import Run as StoredRun
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from mlflow.utils.rest_utils import http_request, verify_rest_response
from sqlalchemy.exc import SQLAlchemyError

from pipeline.errors import UserError, redact_uri
from pipeline.tracking.journal import DiskFault
from pipeline.tracking.sqlite import use_write_ahead_log

RUN_KEY = "run_key"  # the tag by which a run is found that nobody knows the id of
_PROBE_S = 12.0  # that a server may take for its first answer
# What another try won't mend. Of HTTP's 4xx, 408 (too slow) and 429 (too many) it will.
_FOR_GOOD = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, UserError)


class RequestRejected(Exception):
    """MLflow will never take this."""


class Deleted(RequestRejected):
    """The run was deleted in MLflow, or its study was."""


def connect(uri: str, own: Path | None) -> mlflow.MlflowClient:
    """A client of a store that has answered; whatever a driver raises, where it doesn't. One process at a time may call it.

    `own`: the SQLite database that `uri` means, to be made where it is not there.
    """
    if uri.startswith("http"):
        ask(uri, "experiments/search", {"max_results": 1}, _PROBE_S)
        return client_of(uri)
    if own and not own.exists():
        _create(own)
    _connect_once(uri)
    client = client_of(uri)
    client.search_experiments(max_results=1)
    return client


def client_of(uri: str) -> mlflow.MlflowClient:
    """A client whose registry is that of the store, whatever MLFLOW_REGISTRY_URI says; asks nothing yet."""
    return mlflow.MlflowClient(uri, registry_uri=uri)


def _create(database: Path) -> None:
    """MLflow's tables, in a file that gets its name when it has them all: with half of them MLflow can't go on."""
    new = database.with_name(f".{database.name}.new")
    for left in database.parent.glob(f"{new.name}*"):  # by a process that was killed here
        left.unlink()
    client = client_of(f"sqlite:///{new}")
    client.search_experiments(max_results=1)
    client._tracking_client.store.engine.dispose()
    new.rename(database)


def _connect_once(uri: str) -> None:
    """Fail at once where MLflow would try for 100 s; and set SQLite's write-ahead log."""
    from sqlalchemy import create_engine

    engine = create_engine(uri)
    try:
        engine.connect().close()
        use_write_ahead_log(engine)
    finally:
        engine.dispose()


class RunStore:
    """Experiments and runs of an MLflow store, made once."""

    def __init__(self, client: mlflow.MlflowClient, uri: str, artifacts: str | None, lock: FileLock):
        self.client = client
        self._uri, self._artifacts, self._lock = uri, artifacts, lock
        self._experiments: dict[str, str] = {}  # parent run -> its experiment

    def experiment(self, name: str) -> str:
        """The id of the experiment of this name, made where there is none."""
        with self._lock:  # two processes at once would each make it
            found = self.client.get_experiment_by_name(name)
            if found and found.lifecycle_stage == "deleted":
                way = self.way_back(found.experiment_id)
                raise UserError(f"the MLflow experiment {name} was deleted: {way}, or give the study another VERSION")
            if found:
                return found.experiment_id
            return self.client.create_experiment(
                name, self._artifacts, tags={"mlflow.experimentKind": "custom_model_development"}
            )

    def experiment_of(self, start: Mapping[str, Any]) -> str:
        """The experiment in which a run with this first record is."""
        parent = start["tags"].get(MLFLOW_PARENT_RUN_ID)
        if not parent:
            return self.experiment(start["experiment"])
        if parent not in self._experiments:
            self._experiments[parent] = self.client.get_run(parent).info.experiment_id
        return self._experiments[parent]

    def run(self, run_id: str) -> StoredRun | None:
        """The run of this id, deleted or not; None where there is none any more."""
        try:
            return self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def is_deleted(self, run_id: str) -> bool:
        """Whether a run that was there is deleted, or gone for good."""
        found = self.run(run_id)
        return found is None or not is_active(found)

    def is_experiment_active(self, experiment: str) -> bool:
        """Whether it was not deleted; its runs are deleted with it."""
        return bool(self.client.get_experiment(experiment).lifecycle_stage == "active")

    def way_back(self, experiment: str) -> str:
        """How a person restores a deleted run of this experiment: MLflow's pages can't restore experiments."""
        if self.is_experiment_active(experiment):
            return "restore it in MLflow (runs of its experiment, State: Deleted, Restore)"
        command = f".venv/bin/mlflow experiments restore --experiment-id {experiment}"
        return f"MLFLOW_TRACKING_URI={redact_uri(self._uri)} {command} restores it with its runs"

    def make(self, experiment: str, name: str, tags: Mapping[str, str], at: int) -> str:
        """A new run's id; asked for exactly once. `at` is its start in ms.

        MLflow's client sends a request again whose reply was lost, which would make two runs.
        """
        if not self._uri.startswith("http"):
            return self.client.create_run(experiment, start_time=at, tags=dict(tags), run_name=name).info.run_id
        pairs = [{"key": key, "value": value} for key, value in tags.items()]
        body = {"experiment_id": experiment, "start_time": at, "run_name": name, "tags": pairs}
        return str(ask(self._uri, "runs/create", body)["run"]["info"]["run_id"])

    def find(self, experiment: str, key: str, keep: str | None = None) -> StoredRun | None:
        """The run of this key. Of several that a slow server made of one, all but one, `keep` if it is named, are deleted."""
        found = self.client.search_runs([experiment], f"tags.{RUN_KEY} = '{key}'", ViewType.ALL)
        there = [run for run in found if is_active(run)]
        if found and not there:
            raise Deleted("it was deleted in MLflow")
        # That which was written to has metrics or parameters.
        there.sort(key=lambda run: (run.info.run_id == keep, len(run.data.metrics), len(run.data.params)))
        for other in there[:-1]:
            with done_already():
                self.client.delete_run(other.info.run_id)
        return there[-1] if there else None


def is_active(run: StoredRun) -> bool:
    """Whether it was not deleted."""
    return bool(run.info.lifecycle_stage == "active")


@contextlib.contextmanager
def done_already() -> Iterator[None]:
    """For deleting, which MLflow's client does again where an answer was lost; MLflow then says no."""
    try:
        yield
    except MlflowException as error:
        if not is_for_good(error):
            raise


def ask(uri: str, what: str, body: Mapping[str, Any], timeout_s: float | None = None) -> Any:
    """The answer of an MLflow server, asked once. https://mlflow.org/docs/latest/rest-api.html"""
    path = f"/api/2.0/mlflow/{what}"
    answer = http_request(
        get_default_host_creds(uri), path, "POST", max_retries=0, timeout=timeout_s, json=body, raise_on_status=False
    )
    return json.loads(verify_rest_response(answer, path).text)


def is_for_good(error: Exception) -> bool:
    """Whether trying again can't mend it: MLflow understood and said no, or something here is wrong."""
    if isinstance(error, MlflowException):
        code = error.get_http_status_code()
    elif isinstance(error, requests.RequestException):
        code = error.response.status_code if error.response is not None else 503
    elif isinstance(error, (DiskFault, SQLAlchemyError)):
        return False
    else:
        return isinstance(error, (RequestRejected, *_FOR_GOOD)) or not isinstance(error, OSError)
    if "sqlalche.me" in str(error):  # the database behind MLflow is at fault, as when it restarts; MLflow says 400
        return False
    return 400 <= code < 500 and code not in (408, 429)
