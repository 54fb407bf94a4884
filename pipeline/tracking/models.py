"""Which trained model is meant: a run, a folder, a registered name, the champion, or else the best run; and its files."""

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlflow.artifacts
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipeline.errors import DataError, UserError
from pipeline.recipe import parse_recipe
from pipeline.tracking.store import is_active
from pipeline.tracking.tracker import MlflowTracker, State
from pipeline.training.checkpoints import PLAIN_WEIGHTS, RECORD, WEIGHTS, amend, read_checkpoint, read_facts

CHAMPION = "models:/image-classifier@champion"
DIGEST_TAG = "sha256."  # of a registered version, with the name of a file behind it
_NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the latter for an alias that isn't set
_NO_RUN = "no finished run yet: make study NAME=attention DATASET=digits makes some; or MODEL= names a model's folder"


@dataclass(frozen=True)
class Model:
    """A checkpoint's folder, and in words which model it is."""

    folder: Path
    what: str


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path in it."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): _sha256(file) for file in files}


def verify(folder: Path, expected: Mapping[str, str]) -> None:
    """DataError, with a line for each file, unless the folder has exactly the files of these digests."""
    found = digests(folder)
    faults = {
        name: "missing" if name not in found else "not registered" if name not in expected else "its SHA-256 differs"
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name)
    }
    if faults:
        raise DataError([f"{name}: {fault}" for name, fault in faults.items()])


@contextlib.contextmanager
def find_model(home: Path, uri: str | None, wanted: str | None) -> Iterator[Model]:
    """The model of a run's id, `models:/NAME@ALIAS` or `models:/NAME/VERSION`; its files are there while the block runs.

    None means the champion if there is one, else the best finished trial on the data of the study that ran last; what
    finals trained comes in by promotion. `home` and `uri` are MlflowTracker's. A run's files are its checkpoint; a
    registered version's are the package that was registered, each as its tags say. UserError where there is no such
    model, DataError where its files are others.
    """
    if uri is None and not (home / "mlflow.db").exists():
        raise UserError(_NO_RUN)
    tracker = MlflowTracker(home, uri)
    found, what = _found(tracker, wanted)
    with tempfile.TemporaryDirectory() as name:
        if isinstance(found, Run):
            yield Model(_checkpoint(tracker, found, what, Path(name)), what)
        else:
            yield Model(_package(tracker, found, what, Path(name)), what)


def _checkpoint(tracker: MlflowTracker, run: Run, what: str, folder: Path) -> Path:
    """The folder of a run's checkpoint."""
    with _read(what):
        names = {file.path for file in tracker.client.list_artifacts(run.info.run_id)}
        for name in [name for name in (RECORD, WEIGHTS, PLAIN_WEIGHTS) if name in names]:
            tracker.client.download_artifacts(run.info.run_id, name, str(folder))
            if name == RECORD:
                _check_recipe(folder, what)
    if RECORD not in names:
        raise UserError(f"{what}: {_why_no_model(run)}")
    with contextlib.suppress(UserError):  # a damaged one is told by who uses it
        if not read_checkpoint(folder).get("run_id"):  # MLflow had not answered yet when it was written
            amend(folder, {"run_id": run.info.run_id})
    return folder


def _package(tracker: MlflowTracker, version: ModelVersion, what: str, folder: Path) -> Path:
    """The folder of a version's files, after all have been compared with its tags."""
    expected = {
        tag.removeprefix(DIGEST_TAG): digest for tag, digest in version.tags.items() if tag.startswith(DIGEST_TAG)
    }
    if not expected:
        raise DataError(
            f"{what}: has no tags {DIGEST_TAG}<file> to check its files by; make promote registers models with them"
        )
    with _read(what):
        source = tracker.client.get_model_version_download_uri(version.name, version.version)
        with tempfile.TemporaryDirectory() as alone:
            # Some stores give out nothing but the whole.
            with contextlib.suppress(MlflowException, OSError):
                mlflow.artifacts.download_artifacts(f"{source}/{RECORD}", dst_path=alone, tracking_uri=tracker.uri)
            if digests(Path(alone)).get(RECORD) == expected.get(RECORD, ""):
                _check_recipe(Path(alone), what)
        arrived = mlflow.artifacts.download_artifacts(source, dst_path=str(folder), tracking_uri=tracker.uri)
    try:
        verify(Path(arrived), expected)
    except DataError as error:
        way_out = "they are not used; register it again, or go back to another version"
        raise DataError(
            [f"{what}: its files are not those that were registered; {way_out}", *_indented(error)]
        ) from None
    return Path(arrived)


def _check_recipe(folder: Path, what: str) -> None:
    """UserError where a record's recipe is none that this code knows; before the weights are downloaded."""
    try:
        facts = read_facts(folder)
    except UserError:
        return  # a damaged one is told by who uses it
    try:
        parse_recipe(facts.get("recipe", {}) if isinstance(facts, dict) else {})
    except UserError as error:
        way_out = "the commit that it was trained with can"
        raise UserError([f"{what}: its recipe can't be read by this code; {way_out}", *_indented(error)]) from None


@contextlib.contextmanager
def _read(what: str) -> Iterator[None]:
    try:
        yield
    except (MlflowException, OSError) as error:
        raise UserError(f"{what}: its files can't be read ({str(error).splitlines()[0]})") from None


def _indented(error: UserError) -> list[str]:
    return [f"  {line}" for line in error.lines]


def _found(tracker: MlflowTracker, wanted: str | None) -> tuple[Run | ModelVersion, str]:
    if wanted is None:
        return _champion(tracker) or _best_run(tracker)
    if wanted.startswith("models:/"):
        found = _registered(tracker, wanted)
        if found is None and wanted == CHAMPION:
            raise UserError(f"{wanted}: no champion; make promote NAME=attention chooses one")
        if found is None:
            raise UserError(f"{wanted}: no such registered model; models:/NAME@ALIAS or models:/NAME/VERSION names one")
        return found
    if not re.fullmatch(r"[0-9a-f]{32}", wanted):
        raise UserError(f"{wanted}: neither a folder, nor a run's id (32 of 0-9a-f), nor models:/NAME@ALIAS")
    try:
        run = tracker.client.get_run(wanted)
    except MlflowException:
        raise UserError(f"{wanted}: no such run in the tracking store; make ui shows those there are") from None
    return run, _name(run) + ("" if is_active(run) else ", which was deleted in MLflow")


def _champion(tracker: MlflowTracker) -> tuple[ModelVersion, str] | None:
    found = _registered(tracker, CHAMPION)
    return (found[0], f"the champion, {found[1]}") if found else None


def _registered(tracker: MlflowTracker, uri: str) -> tuple[ModelVersion, str] | None:
    """What `models:/NAME@ALIAS` or `models:/NAME/VERSION` means; None where there is no such version."""
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
        return version, f"{what}, {_name(tracker.client.get_run(version.run_id or ''))}"
    except MlflowException:  # a version keeps its files where its run is gone
        return version, f"{what}, of a run that is gone"


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
    return run, f"the best finished run (no champion), {what}"


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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
