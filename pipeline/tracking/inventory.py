"""What a whole store holds, read in bulk: all runs, the points of each metric, where files lie, whether they are whole."""

import contextlib
import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlflow.artifacts import download_artifacts
from mlflow.entities import Run as StoredRun
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.rest_utils import http_request_safe
from mlflow.utils.uri import is_local_uri
from sqlalchemy import create_engine, text

from pipeline.errors import DataError
from pipeline.tracking.models import DIGEST_TAG, verify
from pipeline.tracking.tracker import MlflowTracker
from pipeline.tracking.uploader import RUN_KEY, SYSTEM

_PAGE = 5_000  # runs
_ANSWER, _ASKED = 25_000, 100  # points and runs, of one question to a server


class Points(NamedTuple):
    """The points of one metric of one run."""

    points: int
    steps: int  # different ones
    first: int
    last: int


def all_runs(tracker: MlflowTracker, deleted: bool = False) -> list[StoredRun]:
    """Every run that is ours, of all studies, and of none; or those that were deleted in MLflow and can be restored."""
    view = ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
    there = tracker.client.search_experiments(ViewType.ALL if deleted else view, max_results=50_000)
    experiments = [experiment.experiment_id for experiment in there]
    found: list[StoredRun] = []
    page = None
    while experiments:
        runs = tracker.client.search_runs(
            experiments, f"tags.{RUN_KEY} != ''", view, max_results=_PAGE, order_by=["start_time"], page_token=page
        )
        found += runs
        page = runs.token
        if not page:
            break
    return found


def all_points(tracker: MlflowTracker, runs: Sequence[StoredRun]) -> Mapping[str, Mapping[str, Points]]:
    """The points of these runs, by run and metric; not those of the machine, whose steps only count.

    A database is asked once: its index over runs, metrics and steps holds all of it. A server is asked for each metric of
    each 100 runs.
    """
    found: dict[str, dict[str, Points]] = defaultdict(dict)
    for run_id, name, *counts in _of_server(tracker, runs) if tracker.is_remote else _of_database(tracker.uri):
        found[run_id][name] = Points(*counts)
    return found


def _of_database(uri: str) -> Iterator[Sequence[Any]]:
    query = (
        "SELECT run_uuid, key, COUNT(*), COUNT(DISTINCT step), MIN(step), MAX(step) FROM metrics "
        f"WHERE key NOT LIKE '{SYSTEM}%' GROUP BY run_uuid, key"
    )
    engine = create_engine(uri)
    try:
        with engine.connect() as connection:
            yield from connection.execute(text(query))
    finally:
        engine.dispose()


def _of_server(tracker: MlflowTracker, runs: Sequence[StoredRun]) -> Iterator[Sequence[Any]]:
    credentials = get_default_host_creds(tracker.uri)
    having: dict[str, list[str]] = defaultdict(list)
    longest = 1
    for run in runs:
        for metric in run.data._metric_objs:
            if not metric.key.startswith(SYSTEM):
                having[metric.key].append(run.info.run_id)
                longest = max(longest, metric.step)
    at_once = max(1, min(_ASKED, _ANSWER // (2 * longest)))
    for name, ids in having.items():
        for start in range(0, len(ids), at_once):
            some = ids[start : start + at_once]
            question = {"run_id": some, "metric_key": name, "max_results": _ANSWER}
            way = "/ajax-api/2.0/mlflow/metrics/get-history-bulk"
            answer = http_request_safe(credentials, way, "GET", params=question)
            steps: dict[str, list[int]] = defaultdict(list)
            for point in json.loads(answer.text)["metrics"]:
                steps[point["run_id"]].append(point["step"])
            for run_id, its in steps.items():
                yield run_id, name, len(its), len(set(its)), min(its), max(its)


def folder_of(run: StoredRun) -> Path | None:
    """Where a run's files lie; None where that is not on this machine."""
    where = run.info.artifact_uri or ""
    return Path(local_file_uri_to_path(where)) if is_local_uri(where) else None


def faults_of_versions(tracker: MlflowTracker) -> Iterator[tuple[str, list[str] | None]]:
    """Each registered version, and the files of it that are not those which were registered; None: not to be known here.

    Versions without tags of digests were not registered by promotion, and are left out.
    """
    for version in tracker.client.search_model_versions(max_results=10_000):
        tags = {tag: digest for tag, digest in version.tags.items() if tag.startswith(DIGEST_TAG)}
        if not tags:
            continue
        name = f"{version.name} version {version.version}"
        if tracker.is_remote:
            yield name, None
            continue
        try:
            source = tracker.client.get_model_version_download_uri(version.name, version.version)
            folder = Path(download_artifacts(source, tracking_uri=tracker.uri))  # of local files it gives the place
            verify(folder, {tag.removeprefix(DIGEST_TAG): digest for tag, digest in tags.items()})
            yield name, []
        except DataError as error:
            yield name, error.lines
        except (MlflowException, OSError) as error:
            yield name, [str(error).splitlines()[0]]


def fault_of_database(file: Path) -> str:
    """What is broken in an SQLite file; nothing where it is whole. https://sqlite.org/pragma.html#pragma_quick_check"""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{file.resolve()}?mode=ro", uri=True, timeout=30)) as connection:
            (said,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            return "" if said == "ok" else str(said)
    except sqlite3.Error as error:
        return str(error)
