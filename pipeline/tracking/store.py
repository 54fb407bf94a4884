"""An MLflow store: runs are created once and found by their key; what it rejects is distinguished from outages."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
import requests
from filelock import FileLock
from mlflow.entities import RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from mlflow.utils.rest_utils import http_request, verify_rest_response

from pipeline.errors import UserError, redact_uri
from pipeline.tracking.journal import DiskFault
from pipeline.tracking.sqlite import use_write_ahead_log
from pipeline.tracking.tags import Role, RunTags, StoredRun

_PROBE_S = 12.0  # that a server may take for its first answer
_PAGE_SIZE = 5_000  # runs


class RequestRejected(Exception):
    """MLflow will never accept this request."""


class Deleted(RequestRejected):
    """The run was deleted in MLflow, or its study was."""


# Another try doesn't help against these.
_PERMANENT = (
    *(FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError),
    *(RequestRejected, UserError),
    *(TypeError, ValueError),  # of a request that can't be written
)


def connect(uri: str, own: Path | None) -> mlflow.MlflowClient:
    """A client of a store that has answered; raises whatever a driver raises. One process at a time may call it.

    `own`: the SQLite database that `uri` means, created where it is missing.
    """
    if uri.startswith("http"):
        post(uri, "experiments/search", {"max_results": 1}, _PROBE_S)
        return client_of(uri)
    if own and not own.exists():
        _create(own)
    _connect_once(uri)
    client = client_of(uri)
    client.search_experiments(max_results=1)
    return client


def client_of(uri: str) -> mlflow.MlflowClient:
    """A client whose registry is that of the store, whatever MLFLOW_REGISTRY_URI says; makes no request yet."""
    return mlflow.MlflowClient(uri, registry_uri=uri)


def _create(database: Path) -> None:
    """Create MLflow's tables in a file that gets its name when it has them all: MLflow can't use half of them."""
    new = database.with_name(f".{database.name}.new")
    for leftover in database.parent.glob(f"{new.name}*"):  # of a process that was killed here
        leftover.unlink()
    _make_tables(f"sqlite:///{new}")
    new.rename(database)


def _make_tables(uri: str) -> None:
    _connect_once(uri)  # with the log from the start, MLflow's migrations don't wait for the disk one by one
    client = client_of(uri)
    client.search_experiments(max_results=1)
    client._tracking_client.store.engine.dispose()


def _connect_once(uri: str) -> None:
    """Fail at once where MLflow would retry for 100 s; and set SQLite's write-ahead log."""
    from sqlalchemy import create_engine

    engine = create_engine(uri)
    try:
        engine.connect().close()
        use_write_ahead_log(engine)
    finally:
        engine.dispose()


class RunStore:
    """Experiments and runs of an MLflow store, each created once."""

    def __init__(self, client: mlflow.MlflowClient, uri: str, artifacts: str | None, lock: FileLock):
        self.client = client
        self._uri, self._artifacts, self._lock = uri, artifacts, lock
        self._experiments: dict[str, str] = {}  # parent run -> its experiment

    def experiment(self, name: str) -> str:
        """The id of the experiment of this name, created where there is none. UserError where it was deleted."""
        with self._lock:  # two processes at once would each create it
            experiment = self.client.get_experiment_by_name(name)
            if experiment and experiment.lifecycle_stage == "deleted":
                restore = self.how_to_restore(experiment.experiment_id)
                remedy = f"{restore}, or give the study another number by `--version`"
                raise UserError(f"the MLflow experiment {name}", "was deleted", remedy)
            if experiment:
                return experiment.experiment_id
            return self.client.create_experiment(
                name, self._artifacts, tags={"mlflow.experimentKind": "custom_model_development"}
            )

    def experiment_of(self, start: Mapping[str, Any]) -> str:
        """The experiment of a run with this start record."""
        parent = start["tags"].get(MLFLOW_PARENT_RUN_ID)
        if not parent:
            return self.experiment(start["experiment"])
        if parent not in self._experiments:
            self._experiments[parent] = self.client.get_run(parent).info.experiment_id
        return self._experiments[parent]

    def run(self, run_id: str) -> StoredRun | None:
        """The run of this id, deleted or not; None where MLflow has none."""
        try:
            return self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def is_deleted(self, run_id: str) -> bool:
        """Whether a run that existed is deleted, or removed for good."""
        run = self.run(run_id)
        return run is None or not is_active(run)

    def is_experiment_active(self, experiment: str) -> bool:
        """Whether it was not deleted; its runs are deleted with it."""
        return bool(self.client.get_experiment(experiment).lifecycle_stage == "active")

    def how_to_restore(self, experiment: str) -> str:
        """How a person restores a deleted run of this experiment: MLflow's UI can't restore experiments."""
        if self.is_experiment_active(experiment):
            return "restore it in MLflow (runs of its experiment, State: Deleted, Restore)"
        command = f".venv/bin/mlflow experiments restore --experiment-id {experiment}"
        return f"MLFLOW_TRACKING_URI={redact_uri(self._uri)} {command} restores it with its runs"

    def search(
        self,
        experiments: Sequence[str],
        query: str,
        order: Sequence[str] = (),
        view: int = ViewType.ACTIVE_ONLY,
        page_size: int = _PAGE_SIZE,
    ) -> Iterator[StoredRun]:
        """Every run that a query finds, page by page; MLflow's own search stops after one page."""
        token = None
        while experiments:
            page = self.client.search_runs(
                list(experiments), query, view, max_results=page_size, order_by=list(order), page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return

    def create_run(self, experiment: str, name: str, tags: Mapping[str, str], start_ms: int) -> str:
        """A new run's id; requested exactly once.

        MLflow's client repeats a request whose reply was lost, which would create two runs.
        """
        if not self._uri.startswith("http"):
            return self.client.create_run(experiment, start_time=start_ms, tags=dict(tags), run_name=name).info.run_id
        pairs = [{"key": key, "value": value} for key, value in tags.items()]
        body = {"experiment_id": experiment, "start_time": start_ms, "run_name": name, "tags": pairs}
        return str(post(self._uri, "runs/create", body)["run"]["info"]["run_id"])

    def set_tags(self, run_id: str, tags: RunTags) -> None:
        """Write the tags that are set, in one request."""
        self.client.log_batch(run_id, tags=[RunTag(name, text) for name, text in tags.to_mlflow().items()])

    def find(self, experiment: str, key: str, keep: str | None = None) -> StoredRun | None:
        """The run of this key; None where there is none, Deleted where it was deleted.

        Of several that a slow server created for one key, all are deleted but one: `keep`, else the one with most data.
        """
        runs = self.client.search_runs([experiment], f"tags.run_key = '{key}'", ViewType.ALL)
        active = [run for run in runs if is_active(run)]
        if runs and not active:
            raise Deleted("it was deleted in MLflow")
        # The run that was written to has metrics or parameters.
        active.sort(key=lambda run: (run.info.run_id == keep, len(run.data.metrics), len(run.data.params)))
        for duplicate in active[:-1]:
            with ignore_repeated():
                self.client.delete_run(duplicate.info.run_id)
        return active[-1] if active else None

    def adopt_children(self, parent: str) -> int:
        """Make the children of the deleted runs that a study's run replaces its own; how many there were.

        Also those that were restored in MLflow after the first adoption.
        """
        run = self.client.get_run(parent)
        orphans = [
            child
            for replaced in RunTags.of(run).replaces or ()
            for child in self.search([run.info.experiment_id], child_of(replaced))
        ]
        for child in orphans:
            self.client.set_tag(child.info.run_id, MLFLOW_PARENT_RUN_ID, parent)
        return len(orphans)


def child_of(parent: str, role: Role | None = None) -> str:
    """The query for a run's children, of one role or of all."""
    return f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}'" + (f" and tags.role = '{role}'" if role else "")


def is_active(run: StoredRun) -> bool:
    """Whether it was not deleted."""
    return bool(run.info.lifecycle_stage == "active")


@contextlib.contextmanager
def ignore_repeated() -> Iterator[None]:
    """For deletions, which MLflow's client repeats where an answer was lost; MLflow rejects the repeated one."""
    try:
        yield
    except MlflowException as error:
        if not is_permanent(error):
            raise


def post(uri: str, endpoint: str, body: Mapping[str, Any], timeout_s: float | None = None) -> Any:
    """The answer of an MLflow server to one request, without retries. https://mlflow.org/docs/latest/rest-api.html"""
    path = f"/api/2.0/mlflow/{endpoint}"
    answer = http_request(
        get_default_host_creds(uri), path, "POST", max_retries=0, timeout=timeout_s, json=body, raise_on_status=False
    )
    return json.loads(verify_rest_response(answer, path).text)


def is_permanent(error: Exception) -> bool:
    """Whether another try can't succeed: MLflow understood the request and rejected it, or something here is wrong.

    What is not known to be permanent is retried: file stores in a cloud raise exceptions of their own. Of HTTP's 4xx, 408
    (too slow) and 429 (too many) are worth another try.
    """
    if isinstance(error, MlflowException):
        code = error.get_http_status_code()
    elif isinstance(error, requests.RequestException):
        code = error.response.status_code if error.response is not None else 503
    else:
        return isinstance(error, _PERMANENT) and not isinstance(error, DiskFault)
    if "sqlalche.me" in str(error):  # the database behind MLflow is at fault, as when it restarts; MLflow answers 400
        return False
    return 400 <= code < 500 and code not in (408, 429)
