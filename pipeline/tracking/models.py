"""Which trained model is meant: a run, a registered version, the champion, or else the best run; and its files, verified."""

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

from pipeline.disk import is_new, sha256_of
from pipeline.errors import DataError, Problem, UserError, first_line
from pipeline.recipe import parse_recipe
from pipeline.tracking import queries
from pipeline.tracking.intact import run_label
from pipeline.tracking.run_id import is_run_id
from pipeline.tracking.store import is_active
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker
from pipeline.training.checkpoints import (
    PLAIN_WEIGHTS,
    RECORD,
    WEIGHTS,
    amend,
    read_checkpoint,
    read_facts,
    save_folder,
)

CHAMPION = "models:/image-classifier@champion"
TEACHERS = "teachers"  # in the folder `mlruns`: copies of models that others learn from
DIGEST_TAG = "sha256."  # prefix of a registered version's tags; the name of a file follows
_MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the latter for an alias that isn't set
_NOT_A_MODEL = "neither a folder, nor a run's id (32 of 0-9a-f), nor models:/NAME@ALIAS or models:/NAME/VERSION"
GONE_FOR_GOOD = "where they are gone for good, delete this version in MLflow, and `promote` does without it"
_NO_RUN = Problem(
    "no finished run yet", "", "`study NAME --dataset digits` trains some; or name a model's folder by `--model`"
)


def command_about(model: str, text: str) -> str:
    """A command about a registered model, for a remedy: with `--model`, unless it is the default one."""
    return text if CHAMPION.startswith(f"models:/{model}@") else f"{text} --model {model}"


@dataclass(frozen=True)
class Model:
    """A checkpoint's folder, and which model it is, for people."""

    folder: Path
    label: str


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path in it."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): sha256_of(file) for file in files}


def verify(folder: Path, expected: Mapping[str, str]) -> None:
    """DataError, with a problem for each file, unless the folder has exactly the files of these digests."""
    actual = digests(folder)
    faults = {
        name: "missing" if name not in actual else "not registered" if name not in expected else "its SHA-256 differs"
        for name in sorted({*actual, *expected})
        if actual.get(name) != expected.get(name)
    }
    if faults:
        raise DataError.many([Problem(name, fault) for name, fault in faults.items()])


def version_faults(tracker: MlflowTracker) -> Iterator[tuple[ModelVersion, list[str] | None]]:
    """Each registered version, and what is wrong with its files; None where a server has them.

    Versions without tags of digests were not registered by a promotion, and are omitted.
    """
    for version in tracker.client.search_model_versions(max_results=10_000):
        expected = _expected_digests(version)
        if not expected:
            continue
        if tracker.is_remote:
            yield version, None
            continue
        try:
            source = tracker.client.get_model_version_download_uri(version.name, version.version)
            # For local files this copies nothing and returns their own path.
            verify(Path(mlflow.artifacts.download_artifacts(source, tracking_uri=tracker.uri)), expected)
            yield version, []
        except DataError as error:
            yield version, error.lines
        except (MlflowException, OSError) as error:
            yield version, [first_line(error)]


def _expected_digests(version: ModelVersion) -> dict[str, str]:
    """File -> SHA-256, by a registered version's tags."""
    return {tag.removeprefix(DIGEST_TAG): sha256 for tag, sha256 in version.tags.items() if tag.startswith(DIGEST_TAG)}


@contextlib.contextmanager
def find_model(home: Path, uri: str | None, wanted: str | None) -> Iterator[Model]:
    """The model of a run's id, `models:/NAME@ALIAS` or `models:/NAME/VERSION`; its files exist while the block runs.

    None means the champion if there is one, else the best finished trial on the data of the study that ran last; finals
    become models by promotion only. `home` and `uri` are MlflowTracker's. A run's files are its checkpoint; those of a
    registered version are the package that was registered, verified by its tags. UserError where there is no such
    model, DataError where its files differ.
    """
    if is_new(uri, home / "mlflow.db"):
        if wanted and not _names_one(wanted):
            raise UserError(f"model {wanted}", _NOT_A_MODEL, f"there are no runs yet in {home}")
        raise UserError.many([_NO_RUN])
    tracker = MlflowTracker(home, uri)
    source, label = _resolve(tracker, wanted)
    with tempfile.TemporaryDirectory() as name:
        if isinstance(source, Run):
            yield Model(_checkpoint(tracker, source, label, Path(name)), label)
        else:
            yield Model(_package(tracker, source, label, Path(name)), label)


def keep_model(home: Path, uri: str | None, wanted: str) -> Path:
    """A folder below `home` with the checkpoint of `find_model`, for recipes that name it; it is named by the model's run."""
    with find_model(home, uri, wanted) as model:
        facts, weights = read_checkpoint(model.folder), (model.folder / WEIGHTS).read_bytes()
        name = f"{facts.get('run_id') or 'model'}-{hashlib.sha256(weights).hexdigest()[:8]}"
        folder = home / TEACHERS / name
        if not (folder / RECORD).exists():
            save_folder(folder, {WEIGHTS: weights}, facts)
    return folder


def _checkpoint(tracker: MlflowTracker, run: Run, label: str, folder: Path) -> Path:
    """Download a run's checkpoint; its folder."""
    with _reading(label):
        names = {file.path for file in tracker.client.list_artifacts(run.info.run_id)}
        for name in [name for name in (RECORD, WEIGHTS, PLAIN_WEIGHTS) if name in names]:
            tracker.client.download_artifacts(run.info.run_id, name, str(folder))
            if name == RECORD:
                _check_recipe(folder, label)
    if RECORD not in names:
        raise UserError(label, _why_no_model(run))
    with contextlib.suppress(UserError):  # the user of a damaged one reports it
        if not read_checkpoint(folder).get("run_id"):  # MLflow had not answered yet when it was written
            amend(folder, {"run_id": run.info.run_id})
    return folder


def _package(tracker: MlflowTracker, version: ModelVersion, label: str, folder: Path) -> Path:
    """Download a version's files; their folder, after all were verified by its tags."""
    expected = _expected_digests(version)
    if not expected:
        rule = f"has no tags {DIGEST_TAG}<file> to verify its files by"
        raise DataError(label, rule, "`promote` registers models with them")
    with _reading(label, f"put them back; {GONE_FOR_GOOD}"):
        source = tracker.client.get_model_version_download_uri(version.name, version.version)
        with tempfile.TemporaryDirectory() as record_folder:
            # Some stores can't download a single file of a version.
            with contextlib.suppress(MlflowException, OSError):
                mlflow.artifacts.download_artifacts(
                    f"{source}/{RECORD}", dst_path=record_folder, tracking_uri=tracker.uri
                )
            if digests(Path(record_folder)).get(RECORD) == expected.get(RECORD, ""):
                _check_recipe(Path(record_folder), label)
        downloaded = mlflow.artifacts.download_artifacts(source, dst_path=str(folder), tracking_uri=tracker.uri)
    try:
        verify(Path(downloaded), expected)
    except DataError as error:
        rule = "its files are not those that were registered"
        command = command_about(version.name, "rollback --version N")
        remedy = f"put them back, or `{command}` with a `--reason` takes another version"
        raise DataError(label, rule, f"{remedy}; {GONE_FOR_GOOD}", error.lines) from None
    return Path(downloaded)


def _check_recipe(folder: Path, label: str) -> None:
    """UserError where a record's recipe can't be read by this code; called before the weights are downloaded."""
    try:
        facts = read_facts(folder)
    except UserError:
        return  # the user of a damaged one reports it
    try:
        parse_recipe(facts.get("recipe", {}) if isinstance(facts, dict) else {})
    except UserError as error:
        remedy = "use the commit that it was trained with"
        raise UserError(label, "its recipe can't be read by this code", remedy, error.lines) from None


@contextlib.contextmanager
def _reading(label: str, remedy: str = "") -> Iterator[None]:
    try:
        yield
    except (MlflowException, OSError) as error:
        reason = first_line(error).removesuffix(".")
        raise UserError(label, f"its files can't be read ({reason})", remedy) from None


def _resolve(tracker: MlflowTracker, wanted: str | None) -> tuple[Run | ModelVersion, str]:
    """The run or version that is meant, and its label."""
    if wanted is None:
        return _champion(tracker) or _best_run(tracker)
    if wanted.startswith("models:/"):
        version = _registered(tracker, wanted)
        if version is None and wanted == CHAMPION:
            raise UserError(wanted, "no champion", f"`promote NAME` chooses one; {_known(tracker)}")
        if version is None:
            raise UserError(f"model {wanted}", _why_not_registered(tracker, wanted), _known(tracker))
        return version
    if not _names_one(wanted):
        raise UserError(f"model {wanted}", _NOT_A_MODEL, _known(tracker))
    run = tracker.store.run(wanted)
    if run is None:
        raise UserError(wanted, "no such run in the tracking store", "`ui` shows all runs")
    return run, run_label(run) + ("" if is_active(run) else ", which was deleted in MLflow")


def _names_one(wanted: str) -> bool:
    return wanted.startswith("models:/") or is_run_id(wanted)


def _known(tracker: MlflowTracker) -> str:
    return f"registered: {', '.join(_aliased(tracker)) or 'none yet'}; `ui` shows all runs"


def _aliased(tracker: MlflowTracker) -> list[str]:
    """All that an alias names: `models:/image-classifier@champion`."""
    models = tracker.client.search_registered_models(max_results=1000)
    return [f"models:/{model.name}@{alias}" for model in models for alias in model.aliases]


def _why_not_registered(tracker: MlflowTracker, wanted: str) -> str:
    """Whether the model is missing, or only its version or alias."""
    name = re.split("[@/]", wanted.removeprefix("models:/"))[0]
    versions = [str(v.version) for v in tracker.client.search_model_versions(max_results=10_000) if v.name == name]
    if not versions:
        return "no such registered model"
    return f"{name} has no such version or alias; its versions: {', '.join(sorted(versions, key=int))}"


def _champion(tracker: MlflowTracker) -> tuple[ModelVersion, str] | None:
    champion = _registered(tracker, CHAMPION)
    return (champion[0], f"the champion, {champion[1]}") if champion else None


def _registered(tracker: MlflowTracker, uri: str) -> tuple[ModelVersion, str] | None:
    """The version of `models:/NAME@ALIAS` or `models:/NAME/VERSION`, and its label; None where there is none."""
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
        if error.error_code in _MISSING:
            return None
        raise UserError(uri, f"can't be looked up ({first_line(error)})") from None
    label = f"{name} version {version.version}"
    try:
        return version, f"{label}, {run_label(tracker.client.get_run(version.run_id or ''))}"
    except MlflowException:  # with the run its files went, unless they lie elsewhere; reading them tells
        return version, f"{label}, of a run that was removed"


def _best_run(tracker: MlflowTracker) -> tuple[Run, str]:
    """The best run of all studies with data and objective of the one that ran last: only their scores are comparable."""
    candidates: list[tuple[float, Run, str]] = []
    last_task: tuple[str | None, ...] | None = None
    for study in queries.studies(tracker):
        for run_id in queries.best_run_ids(tracker, study, 1):
            run = tracker.client.get_run(run_id)
            tags = RunTags.of(run)
            task = (study.objective, tags.data_digest, tags.split_digest)
            last_task = last_task or task
            if task == last_task:
                score = run.data.metrics[study.objective]
                candidates.append((score, run, f"{run_label(run)}, {study.objective} {score:.4f}"))
    if not candidates:
        raise UserError.many([_NO_RUN])
    _, run, label = max(candidates, key=lambda candidate: candidate[0])
    named = CHAMPION.removeprefix("models:/").partition("@")
    others = ", ".join(name for name in _aliased(tracker) if name.endswith(f"@{named[2]}"))
    why = f"no champion of {named[0]}; registered: {others}" if others else "no champion"
    return run, f"the best finished run ({why}), {label}"


def _why_no_model(run: Run) -> str:
    tags = RunTags.of(run)
    if tags.role == "study":
        return "a study, not one of its trials; only trials have models"
    if tags.state is State.FINISHED:
        return f"finished, but its model is not at {run.info.artifact_uri}"
    return f"{tags.state or run.info.status.lower()}, without a model; only a finished run has one"
