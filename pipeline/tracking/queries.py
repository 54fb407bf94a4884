"""What MLflow holds: studies and their runs, which study a name means, files, and every metric's points in bulk.

Runs that were deleted in MLflow and those with missing tags (see intact.py) are left out, unless a function says more.
"""

import contextlib
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mlflow.entities import ViewType
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.rest_utils import http_request_safe
from mlflow.utils.uri import is_local_uri
from sqlalchemy import create_engine, text

from pipeline.errors import Problem, UserError, did_you_mean
from pipeline.evaluation.constraints import nearest, violations
from pipeline.tracking.intact import describe_omitted, intact
from pipeline.tracking.store import child_of, is_active
from pipeline.tracking.study_key import StudyKey
from pipeline.tracking.tags import Role, RunTags, State, StoredRun
from pipeline.tracking.tracker import MlflowTracker
from pipeline.tracking.uploader import SYSTEM

_OLDEST_FIRST = ("attributes.start_time ASC",)
_MOST_EXPERIMENTS = 50_000
_BULK_POINTS, _BULK_RUNS = 25_000, 100  # in one answer of a server


@dataclass(frozen=True)
class StudyRuns:
    """Where a study's runs are in MLflow, and the metric that ranks them."""

    name: str
    parent: str  # run id
    experiment: str
    objective: str
    view: str | None  # the key of its view in the UI
    places: Sequence[str] = ()  # where its data set lay, the newest first
    constraints: Mapping[str, float] = field(default_factory=dict)  # metric -> its upper bound
    planned_trials: int | None = None  # None: its run is older than that tag
    is_open: bool = False  # it runs, or was stopped before its end

    def broken_by(self, run: StoredRun) -> str:
        """The constraints that a run breaks, see `violations`; empty for a feasible one."""
        return violations(self.constraints, run.data.metrics)


class Points(NamedTuple):
    """The points of one metric of one run."""

    points: int
    steps: int  # different ones
    first: int
    last: int


# ------------------------------------------------------------------------------------------------------------- studies


def studies(tracker: MlflowTracker) -> list[StudyRuns]:
    """The studies in this store, the last one run first; a restored run that another one had replaced is none."""
    stored, replaced = [], set[str]()
    for parent in _study_runs(tracker, ViewType.ACTIVE_ONLY, ViewType.ACTIVE_ONLY):
        tags, info = RunTags.of(parent), parent.info
        assert tags.study and tags.objective  # it is intact
        replaced.update(tags.replaces or ())
        # A study that was opened again is RUNNING, and still has an end.
        end = float("inf") if info.status == "RUNNING" else info.end_time
        study = StudyRuns(
            tags.study,
            info.run_id,
            info.experiment_id,
            tags.objective,
            tags.view,
            tags.data_places or (),
            tags.constraints or {},
            tags.planned_trials,
            info.status == "RUNNING" or tags.state is not State.FINISHED,
        )
        stored.append((end, study))
    return [study for _, study in sorted(stored, key=lambda item: -item[0]) if study.parent not in replaced]


def find_studies(tracker: MlflowTracker, name: str) -> list[StudyRuns]:
    """Those of a module's name (`attention`) or of a complete one (`attention-v1-cifar10`), the last one run first.

    A folder's may be named without the digits of its digest, too. UserError where there is none.
    """
    known = studies(tracker)
    matching = [study for study in known if study.name == name] or [
        study for study in known if _matches(name, study.name)
    ]
    if not matching:
        if deleted := _deleted_studies(tracker, name):
            resume = f"`study {name}` resumes what remains of it"
            raise UserError.many(
                [
                    Problem(f"study {key}", "was deleted in MLflow", f"{restore}, or {resume}")
                    for key, restore in deleted.items()
                ]
            )
        names = ", ".join(sorted(study.name for study in known)) or "none"
        keys = [key for study in known if (key := StudyKey.parse(study.name))]
        names_known = [key.study for key in keys] + [study.name for study in known]
        raise UserError(
            f"no study {name} in the tracking store{did_you_mean(name, names_known)}",
            f"the studies are: {names}",
            "`study NAME` runs one, and repairs one whose tags were removed in MLflow",
        )
    return matching


def study_of(tracker: MlflowTracker, run: StoredRun) -> StudyRuns | None:
    """The study that a run belongs to."""
    name, experiment = RunTags.of(run).study, run.info.experiment_id
    return next((s for s in studies(tracker) if (s.name, s.experiment) == (name, experiment)), None)


def find_study(tracker: MlflowTracker, name: str) -> tuple[StudyRuns, str]:
    """The last one run of those that a name means; and a line that says so where there are several, else nothing."""
    last, *others = find_studies(tracker, name)
    names = ", ".join(map(_with_place, others))
    line = f"{_with_place(last)}, the last one run; {name} also means {names}: give the complete name to choose one"
    return last, line if others else ""


def _matches(name: str, study: str) -> bool:
    key = StudyKey.parse(study)
    return study == name or bool(key and key.is_meant_by(name))


def _with_place(study: StudyRuns) -> str:
    """Its name, and where its data set lay last: a name may only have a digest's digits for its folder."""
    return f"{study.name} ({study.places[0]})" if study.places else study.name


def _deleted_studies(tracker: MlflowTracker, name: str) -> dict[str, str]:
    """The names of studies that a name means and that were deleted in MLflow -> how a person restores each."""
    deleted = {str(RunTags.of(run).study): run for run in _study_runs(tracker, ViewType.ALL, ViewType.DELETED_ONLY)}
    return {
        key: tracker.store.how_to_restore(run.info.experiment_id) for key, run in deleted.items() if _matches(name, key)
    }


def _study_runs(tracker: MlflowTracker, experiments: int, runs: int) -> Iterable[StoredRun]:
    """Studies' own runs, in one query for all experiments: a server may hold hundreds of others; two ViewTypes."""
    found = tracker.client.search_experiments(experiments, max_results=_MOST_EXPERIMENTS)
    ids = [experiment.experiment_id for experiment in found]
    return intact(tracker.store.search(ids, "tags.role = 'study'", view=runs))


# ----------------------------------------------------------------------------------------------------- a study's runs


def children(tracker: MlflowTracker, study: StudyRuns, role: Role | None = None) -> list[StoredRun]:
    """A study's runs of this role, or all, as MLflow has them, the oldest first."""
    query = child_of(study.parent, role)
    return list(intact(tracker.store.search([study.experiment], query, _OLDEST_FIRST)))


def best_run_ids(tracker: MlflowTracker, study: StudyRuns, count: int) -> list[str]:
    """The ids of the finished and feasible trials' runs, best first; not those of finals and reproductions."""
    query = f"{child_of(study.parent, 'trial')} and tags.state = 'finished'"
    order = [f"metrics.`{study.objective}` DESC"]
    ranked = intact(tracker.store.search([study.experiment], query, order, page_size=count + 10))
    return [run.info.run_id for run in islice((run for run in ranked if not study.broken_by(run)), count)]


def no_best_run(tracker: MlflowTracker, study: StudyRuns) -> UserError:
    """Why `best_run_ids` finds none: no trial finished, or which infeasible one is the nearest to the bounds."""
    infeasible = [run for run in children(tracker, study, "trial") if study.broken_by(run)]
    if not infeasible:
        return UserError(
            f"study {study.name}", "no finished trial yet", "`study NAME` resumes it, `--trials` adds some"
        )
    closest = nearest(study.constraints, [(str(run.info.run_name), run.data.metrics) for run in infeasible])
    return UserError(
        f"study {study.name}",
        f"no feasible trial; the nearest is {closest}",
        "`--trials` adds some; other bounds are another `--version`",
    )


def find_run(tracker: MlflowTracker, run_id: str) -> StoredRun:
    """The run of a model, which keeps what is made and measured of it; UserError where it can't."""
    run = tracker.store.run(run_id) if run_id else None
    if run is None:
        rule = "is not in this tracking store, which would keep what is made of its model"
        raise UserError(f"run {run_id}".strip(), rule, "name another store by `--tracking-uri`")
    if not is_active(run):
        raise UserError(f"run {run_id}", "was deleted in MLflow", tracker.store.how_to_restore(run.info.experiment_id))
    return run


def deleted_children(tracker: MlflowTracker, parent: str) -> list[StoredRun]:
    """The deleted runs of a study that can still be restored, the oldest first; `parent` is the study's own run."""
    return _children_of(tracker, parent, ViewType.DELETED_ONLY)


def deleted_keys(tracker: MlflowTracker, parent: str) -> set[str]:
    """The run keys of a study's runs that were deleted in MLflow; `parent` is the study's own run.

    Not of a run of which only a duplicate was deleted, as the uploader does where a slow server made two of one key.
    """
    deleted, active = (
        keys_of(_children_of(tracker, parent, view)) for view in (ViewType.DELETED_ONLY, ViewType.ACTIVE_ONLY)
    )
    return deleted - active


def keys_of(runs: Sequence[StoredRun]) -> set[str]:
    """The run keys of those that have one."""
    return {key for run in runs if (key := RunTags.of(run).run_key)}


def _children_of(tracker: MlflowTracker, parent: str, view: int) -> list[StoredRun]:
    run = tracker.client.get_run(parent)
    return [
        child
        for run_id in (parent, *(RunTags.of(run).replaces or ()))
        for child in tracker.store.search([run.info.experiment_id], child_of(run_id), _OLDEST_FIRST, view)
    ]


def omitted_lines(tracker: MlflowTracker, study: StudyRuns) -> list[str]:
    """A line for a study's deleted runs, and one for those with missing tags: no command reads those runs."""
    runs = list(tracker.store.search([study.experiment], child_of(study.parent)))
    deleted = deleted_children(tracker, study.parent)
    return describe_omitted(runs, deleted, tracker.store.how_to_restore(study.experiment))


def ensembles(tracker: MlflowTracker) -> list[StoredRun]:
    """The runs that combine others, of all studies and of none."""
    experiments = tracker.client.search_experiments(max_results=_MOST_EXPERIMENTS)
    ids = [experiment.experiment_id for experiment in experiments]
    return list(intact(tracker.store.search(ids, "tags.role = 'ensemble'")))


# ------------------------------------------------------------------------------------------------------------ one run


def read_file(tracker: MlflowTracker, run_id: str, name: str) -> bytes | None:
    """An artifact's bytes; None where the run has none of this name."""
    if name not in {file.path for file in tracker.client.list_artifacts(run_id, os.path.dirname(name) or None)}:
        return None
    with tempfile.TemporaryDirectory() as folder:
        return Path(tracker.client.download_artifacts(run_id, name, folder)).read_bytes()


def data_places(tracker: MlflowTracker, run_id: str) -> list[str]:
    """Where a run's data set lay, the newest first: the places that its study keeps, then the one that the run logged."""
    run = tracker.store.run(run_id)
    if run is None or not is_active(run):
        return []
    study = tracker.store.run(RunTags.of(run).parent_run or run_id)
    inputs = run.inputs.dataset_inputs if run.inputs else []
    logged = [json.loads(shown.dataset.source).get("uri", "") for shown in inputs]
    study_places = RunTags.of(study).data_places if study else None
    return list(dict.fromkeys([*(study_places or ()), *filter(os.path.isabs, logged)]))


class DataSize(NamedTuple):
    """How many images a run was trained and validated on."""

    training: int
    validation: int
    classes: int


def data_size(run: StoredRun) -> DataSize | None:
    """As the run logged it; None where it did not, or that can't be read."""
    for shown in run.inputs.dataset_inputs if run.inputs else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            profile, shape = (json.loads(text or "") for text in (shown.dataset.profile, shown.dataset.schema))
            return DataSize(int(profile["num_train"]), int(profile["num_validation"]), len(shape["classes"]))
    return None


def artifact_folder(run: StoredRun) -> Path | None:
    """Where a run's files lie; None where that is not on this machine."""
    uri = run.info.artifact_uri or ""
    return Path(local_file_uri_to_path(uri)) if is_local_uri(uri) else None


# ---------------------------------------------------------------------------------------------------- the whole store


def all_runs(tracker: MlflowTracker, deleted: bool = False) -> list[StoredRun]:
    """Every run with a run key, in a study or not, the oldest first; or those that were deleted and can be restored."""
    view = ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
    experiments = tracker.client.search_experiments(ViewType.ALL if deleted else view, max_results=_MOST_EXPERIMENTS)
    ids = [experiment.experiment_id for experiment in experiments]
    return list(tracker.store.search(ids, "tags.run_key != ''", _OLDEST_FIRST, view))


def all_points(tracker: MlflowTracker, runs: Sequence[StoredRun]) -> Mapping[str, Mapping[str, Points]]:
    """The points of these runs, by run and metric; without those of the machine, whose steps only count.

    A database answers one query: its index over runs, metrics and steps holds all of it. A server answers one for each
    metric of 100 runs.
    """
    by_run: dict[str, dict[str, Points]] = defaultdict(dict)
    for run_id, name, *counts in (
        _points_of_server(tracker, runs) if tracker.is_remote else _points_of_database(tracker)
    ):
        by_run[run_id][name] = Points(*counts)
    return by_run


def _points_of_database(tracker: MlflowTracker) -> Iterator[Sequence[Any]]:
    query = (
        "SELECT run_uuid, key, COUNT(*), COUNT(DISTINCT step), MIN(step), MAX(step) FROM metrics "
        f"WHERE key NOT LIKE '{SYSTEM}%' GROUP BY run_uuid, key"
    )
    engine = create_engine(tracker.uri)
    try:
        with engine.connect() as connection:
            yield from connection.execute(text(query))
    finally:
        engine.dispose()


def _points_of_server(tracker: MlflowTracker, runs: Sequence[StoredRun]) -> Iterator[Sequence[Any]]:
    credentials = get_default_host_creds(tracker.uri)
    runs_by_metric: dict[str, list[str]] = defaultdict(list)
    longest = 1
    for run in runs:
        for metric in run.data._metric_objs:
            if not metric.key.startswith(SYSTEM):
                runs_by_metric[metric.key].append(run.info.run_id)
                longest = max(longest, metric.step)
    runs_at_once = max(1, min(_BULK_RUNS, _BULK_POINTS // (2 * longest)))
    for name, ids in runs_by_metric.items():
        for start in range(0, len(ids), runs_at_once):
            params = {"run_id": ids[start : start + runs_at_once], "metric_key": name, "max_results": _BULK_POINTS}
            path = "/ajax-api/2.0/mlflow/metrics/get-history-bulk"
            answer = http_request_safe(credentials, path, "GET", params=params)
            steps_by_run: dict[str, list[int]] = defaultdict(list)
            for point in json.loads(answer.text)["metrics"]:
                steps_by_run[point["run_id"]].append(point["step"])
            for run_id, steps in steps_by_run.items():
                yield run_id, name, len(steps), len(set(steps)), min(steps), max(steps)
