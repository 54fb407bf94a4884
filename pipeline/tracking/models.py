"""Which trained model is meant: a run, a folder, a registered name, the champion, or else the best run; and its files."""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from pipeline.errors import UserError
from pipeline.tracking.runs import MlflowTracker, State
from pipeline.training.checkpoints import PLAIN_WEIGHTS, RECORD, WEIGHTS

CHAMPION = "models:/image-classifier@champion"
_NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the latter for an alias that isn't set
_NO_RUN = "no finished run yet: make study NAME=attention DATASET=digits makes some; or MODEL= names a model's folder"


@dataclass(frozen=True)
class Model:
    """A checkpoint's folder, and in words which model it is."""

    folder: Path
    what: str


@contextlib.contextmanager
def find_model(home: Path, uri: str | None, wanted: str | None) -> Iterator[Model]:
    """The model of a run's id, `models:/NAME@ALIAS` or `models:/NAME/VERSION`; its files are there while the block runs.

    None means the champion if there is one, else the best finished trial on the data of the study that ran last; what
    finals trained comes in by promotion. `home` and `uri` are MlflowTracker's. UserError where there is no such model.
    """
    if uri is None and not (home / "mlflow.db").exists():
        raise UserError(_NO_RUN)
    tracker = MlflowTracker(home, uri)
    run, what = _run(tracker, wanted)
    with tempfile.TemporaryDirectory() as folder:
        try:
            names = {file.path for file in tracker.client.list_artifacts(run.info.run_id)}
            for name in names & {RECORD, WEIGHTS, PLAIN_WEIGHTS}:
                tracker.client.download_artifacts(run.info.run_id, name, folder)
        except (MlflowException, OSError) as error:
            raise UserError(f"{what}: its files can't be read ({str(error).splitlines()[0]})") from None
        if RECORD not in names:
            raise UserError(f"{what}: {_why_no_model(run)}")
        yield Model(Path(folder), what)


def _run(tracker: MlflowTracker, wanted: str | None) -> tuple[Run, str]:
    if wanted is None:
        return _champion(tracker) or _best_run(tracker)
    if wanted.startswith("models:/"):
        found = _registered(tracker, wanted)
        if found is None:
            raise UserError(f"{wanted}: no such registered model; models:/NAME@ALIAS or models:/NAME/VERSION names one")
        return found
    if not re.fullmatch(r"[0-9a-f]{32}", wanted):
        raise UserError(f"{wanted}: neither a folder, nor a run's id (32 of 0-9a-f), nor models:/NAME@ALIAS")
    try:
        run = tracker.client.get_run(wanted)
    except MlflowException:
        raise UserError(f"{wanted}: no such run in the tracking store; make ui shows those there are") from None
    return run, _name(run)


def _champion(tracker: MlflowTracker) -> tuple[Run, str] | None:
    found = _registered(tracker, CHAMPION)
    return (found[0], f"the champion, {found[1]}") if found else None


def _registered(tracker: MlflowTracker, uri: str) -> tuple[Run, str] | None:
    """The run behind `models:/NAME@ALIAS` or `models:/NAME/VERSION`; None where there is no such version.

    UserError where there is one whose run can't be read: another model in its place would be a silent change.
    """
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
    if not match:
        return None
    name, alias, number = match.groups()
    try:
        if alias:
            version = tracker.client.get_model_version_by_alias(name, alias)
        else:
            version = tracker.client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code in _NOT_THERE:
            return None
        raise UserError(f"{uri}: can't be looked up ({str(error).splitlines()[0]})") from None
    what = f"{name} version {version.version}"
    try:
        run = tracker.client.get_run(version.run_id or "")  # a version may have been made of no run
    except MlflowException:
        raise UserError(f"{uri}: {what} is there, but not the run that it was made of") from None
    return run, f"{what}, {_name(run)}"


def _best_run(tracker: MlflowTracker) -> tuple[Run, str]:
    """Of all studies with the data and the objective of the one that ran last: their scores can be compared."""
    best: list[tuple[float, Run, str]] = []
    asked: tuple[str, ...] = ()
    for study in tracker.studies():
        for run_id in tracker.best_run_ids(study, 1):
            run = tracker.client.get_run(run_id)
            question = (study.objective, *(run.data.tags.get(digest, "") for digest in ("data_digest", "split_digest")))
            asked = asked or question
            if question == asked:
                score = run.data.metrics[study.objective]
                best.append((score, run, f"{_name(run)}, {study.objective} {score:.4f}"))
    if not best:
        raise UserError(_NO_RUN)
    _, run, what = max(best, key=lambda item: item[0])
    return run, f"the best finished run (no champion yet), {what}"


def _why_no_model(run: Run) -> str:
    state = run.data.tags.get("state", run.info.status.lower())
    if run.data.tags.get("role") == "study":
        return "a whole study, not one of its trials; its trials have models"
    if state == State.FINISHED:
        return f"finished, but its model is not at {run.info.artifact_uri}"
    return f"{state}, without a model; only a finished run has one"


def _name(run: Run) -> str:
    """`trial 3 of attention-v1-digits, run 0123...`, as a person finds it."""
    study = run.data.tags.get("study")
    return f"{run.info.run_name} of {study}, run {run.info.run_id}" if study else f"run {run.info.run_id}"
