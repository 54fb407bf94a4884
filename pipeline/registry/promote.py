"""Who is champion: evaluated on the test split, packed, registered, and served by an alias that moves last.

Every change is claimed in the ledger before its first effect and closed there after its last (see ledger.py). A kill at any
point leaves the old champion's alias where it was, or the new one's complete: `settle`, which every command calls first,
finishes what has its version and undoes what has none.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout
from mlflow.entities.model_registry import ModelVersion

from pipeline.errors import PromotionRefused, UserError
from pipeline.inference.classifier import ModelMetadata
from pipeline.registry.candidate_evaluation import (
    CONTROL,
    CandidateEvaluation,
    EvaluatedModel,
    EvaluationObserver,
)
from pipeline.registry.card import description
from pipeline.registry.gate import Rules
from pipeline.registry.ledger import (
    CHANGES,
    DELETED,
    PROMOTED,
    REFUSED,
    ROLLED_BACK,
    UNDONE,
    Champion,
    Event,
    Ledger,
    before,
)
from pipeline.registry.package import CARD, Package, package
from pipeline.registry.registered_model import CHAMPION, PREVIOUS, TOKEN_TAG, Registry, promoted_versions, version_label
from pipeline.tracking import queries
from pipeline.tracking.models import DIGEST_TAG, find_model
from pipeline.tracking.store import is_active
from pipeline.tracking.tags import RunTags
from pipeline.tracking.tracker import MlflowTracker

ARTIFACTS = "model"  # where a package lies among its run's artifacts
CHANGE_WAIT_S = 60.0  # for another command's change of champion, which uploads the files of a model
_TAG_LIMIT = 5000  # characters; the column's width


@contextlib.contextmanager
def promotion_lock(home: Path) -> Iterator[None]:
    """The only promotion of a folder mlruns, from before its evaluation on; PromotionRefused at once where there is one."""
    with _locked(home / "promotion.lock", 0, "another promotion is under way"):
        yield


@contextlib.contextmanager
def registry_lock(home: Path) -> Iterator[None]:
    """The only change of champion in a folder mlruns, which takes seconds; PromotionRefused after CHANGE_WAIT_S."""
    with _locked(home / "registry.lock", CHANGE_WAIT_S, "another command is changing the champion"):
        yield


@contextlib.contextmanager
def _locked(file: Path, wait_s: float, rule: str) -> Iterator[None]:
    try:
        with FileLock(file, timeout=wait_s):
            yield
    except Timeout:
        raise PromotionRefused(str(file.parent), rule, "wait for it, and try again") from None


def settle(tracker: MlflowTracker, ledger: Ledger, note: Callable[[str], None]) -> None:
    """Finish or undo interrupted changes, and record in the ledger which former champions were deleted in MLflow.

    Models of another tracking store stay as they are. Call it under `registry_lock`, so that whoever began them has ended.
    """
    for begun in ledger.unfinished():
        registry = Registry(tracker, ledger, begun.model)
        if registry.elsewhere:
            continue
        kind = "rollback" if begun.details["kind"] == ROLLED_BACK else "promotion"
        change = f"a {kind} of {begun.model}, begun {begun.time} and interrupted"
        version, over, aliased = registry.version_made_by(begun), begun.details["over"], registry.alias(CHAMPION)
        if version is not None and aliased in (over, version):
            _move(registry, begun, version)
            note(f"{change}, was finished: {version_label(version)} is champion")
        else:
            why = "its version is not in the registry" if version is None else "the alias was moved by hand meanwhile"
            ledger.end(begun, UNDONE, version, f"interrupted: {why}")
            note(f"{change}, was undone ({why}): {version_label(aliased)} is champion; the same command repeats it")
    for model in dict.fromkeys(event.model for event in ledger.events() if event.kind in CHANGES):
        for deleted in (registry := Registry(tracker, ledger, model)).deleted():
            role = "the champion" if deleted == ledger.champions(model)[-1] else "a former champion"
            reason = f"deleted in MLflow; was {role}"
            ledger.record(DELETED, model, deleted.run, version=deleted.version, reason=reason)
            for alias in (CHAMPION, PREVIOUS):  # of a version whose run was removed; MLflow removes those of a version
                if registry.alias(alias) == deleted.version:
                    registry.set_alias(alias, None)
            what = f"{model} {version_label(deleted.version)}, {role},"
            note(f"{what} was deleted in MLflow, or its run for good: the ledger has it as deleted")


def _move(registry: Registry, begun: Event, version: str) -> None:
    """The last step of every change, safe to repeat. The alias `champion`, which others read, moves last."""
    registry.set_alias(PREVIOUS, begun.details["previous"])
    registry.set_alias(CHAMPION, version)
    registry.ledger.end(begun, begun.details["kind"], version)


# ---------------------------------------------------------------------------------------------------------- rollback


def roll_back(registry: Registry, version: str | None, reason: str) -> Champion:
    """Make the champion before, or `version`, champion again; call it under `registry_lock` and after `settle`.

    UserError where there is none before, no reason, or its files can't be read; DataError where they were changed.
    """
    if not reason.strip():
        raise UserError("`--reason`", "is empty", 'say why, e.g. `--reason "slower in production than here"`')
    champions = registry.ledger.champions(registry.model)
    if version is None:
        registry.champion()  # alias and ledger agree
        if len(champions) < 2:
            rule = "its champion is the first" if champions else "has no champion"
            raise UserError(registry.model, rule, "there is nothing to go back to")
        target = champions[-2]
    else:
        target = Champion(version, registry.run_of(version))
        if champions and target == champions[-1] and registry.alias(CHAMPION) == version:
            raise UserError(f"`--version {version}`", "is champion already")
    with find_model(registry.ledger.home, registry.tracker.uri, f"models:/{registry.model}/{target.version}"):
        pass  # its files are there, and are those that were registered
    earlier = before(champions, target)
    begun = registry.ledger.begin(
        ROLLED_BACK,
        registry.model,
        target.run,
        champions[-1] if champions else None,
        version=target.version,
        previous=earlier[-1].version if earlier else None,
        reason=reason,
    )
    _move(registry, begun, target.version)
    return target


# --------------------------------------------------------------------------------------------------------- promotion


def promote(
    registry: Registry,
    run_id: str,
    rules: Rules,
    data_dir: Path,
    observer: EvaluationObserver,
    forced: str = "",
    chosen: str = "",
    dataset: str | None = None,
) -> Champion:
    """Evaluate a run's model against the champion and make it champion.

    Does nothing where it is champion. A run that was evaluated on the same split is evaluated again only if `forced`
    says why. `chosen` says why this run is the candidate, for the record; `dataset` is where its data set lies, if that
    is not known. PromotionRefused where a rule, or that one, says no, where another promotion is under way, and where
    the champion changed meanwhile: a rollback doesn't wait for the evaluation.
    """
    with promotion_lock(registry.ledger.home), tempfile.TemporaryDirectory() as name:
        with _settled(registry, observer):
            champion = registry.champion()
        if champion and champion.run == run_id:
            served = f"{registry.model} {version_label(champion.version)}"
            observer.note(f"run {run_id} is champion already, {served}: nothing to do")
            return champion
        _check_candidate(registry, run_id)
        folder = Path(name)
        evaluation = CandidateEvaluation(registry, rules, data_dir, folder, observer, dataset)
        packed = next(iter(promoted_versions(registry.tracker, run_id)), None)
        source = f"models:/{packed.name}/{packed.version}" if packed else None
        challenger = evaluation.model(run_id, "challenger", source)
        verdict = evaluation.verdict(challenger, champion, forced, chosen)
        if verdict.kind == REFUSED:
            raise _refusal(registry, verdict)
        files = packed or _pack(evaluation, challenger, verdict, folder / "package")
        label = _label(registry, challenger, verdict, files)
        with _settled(registry, observer):
            version = registry.version_of(run_id)
            if version:
                _relabel(registry, version, label)
            begun = registry.ledger.begin(
                PROMOTED,
                registry.model,
                run_id,
                champion,
                version=version,
                previous=champion.version if champion else None,
                reason=verdict.reason,
            )
            version = version or _register(registry, begun, label, files)
            _move(registry, begun, version)
    return Champion(version, run_id)


@contextlib.contextmanager
def _settled(registry: Registry, observer: EvaluationObserver) -> Iterator[None]:
    """Under `registry_lock`, after `settle`."""
    with registry_lock(registry.ledger.home):
        settle(registry.tracker, registry.ledger, observer.note)
        yield


def _pack(evaluation: CandidateEvaluation, challenger: EvaluatedModel, verdict: Event, folder: Path) -> Package:
    """The package of a model that passed, with the ONNX file that was evaluated."""
    onnx_file = evaluation.onnx_of_verdict(challenger, verdict)
    return package(evaluation.registry.tracker, challenger.run, challenger.folder, folder, verdict.evidence, onnx_file)


def _check_candidate(registry: Registry, run_id: str) -> None:
    """UserError for a run that a person deleted, for an infeasible one, and for a reproduction.

    A reproduction's bits are another run's: under a second name one model would be evaluated twice on the test split.
    """
    tracker = registry.tracker
    run = tracker.store.run(run_id)
    if run is None:
        return  # find_model reports it
    if not is_active(run):
        way_back = tracker.store.how_to_restore(run.info.experiment_id)
        raise UserError(f"run {run_id}", "was deleted in MLflow", f"{way_back}, or take another")
    if first := RunTags.of(run).reproduces:
        remedy = f"`{registry.command(f'promote --run {first}')}` evaluates the run"
        raise UserError(f"run {run_id}", "a reproduction, which is no candidate", remedy)
    study = queries.study_of(tracker, run)
    if study and (broken := study.broken_by(run)):
        remedy = f"`{registry.command(f'promote {study.name}')}` takes a feasible one"
        raise PromotionRefused(f"run {run_id}", f"infeasible: {broken}", remedy)


def _refusal(registry: Registry, verdict: Event) -> PromotionRefused:
    """One problem for each rule that says no, and the way to a first champion where there is none."""
    record = verdict.evidence.record
    problems = record.verdict.problems
    if record.opponent == CONTROL:
        remedy = f"`{registry.command(f'promote --run {record.opponent_run}')}` takes that one"
        hint = f"no champion yet, and the control is its opponent: {remedy}"
        problems[-1] = replace(problems[-1], details=(hint,))
    return PromotionRefused.many(problems)


@dataclass(frozen=True)
class _Label:
    """What a version says of itself in the registry."""

    tags: dict[str, str]
    description: str


def _label(registry: Registry, challenger: EvaluatedModel, verdict: Event, files: ModelVersion | Package) -> _Label:
    """By the verdict that promotes it. Files that are registered already keep their card, with the first verdict."""
    tags = _version_tags(registry, challenger.metadata, verdict)
    if isinstance(files, Package):
        return _Label(tags | {f"{DIGEST_TAG}{name}": digest for name, digest in files.sha256.items()}, files.card)
    digests = {key: value for key, value in files.tags.items() if key.startswith(DIGEST_TAG)}
    note = f"Promoted by the verdict of {verdict.time}, which the tags state. The card is of the first promotion."
    card = (challenger.folder / CARD).read_text(encoding="utf-8")
    return _Label(tags | digests, description(f"{note}\n\n{card}"))


def _relabel(registry: Registry, version: str, label: _Label) -> None:
    client = registry.tracker.client
    for name, value in label.tags.items():
        client.set_model_version_tag(registry.model, version, name, value)
    client.update_model_version(registry.model, version, description=label.description)


def _register(registry: Registry, begun: Event, label: _Label, files: ModelVersion | Package) -> str:
    """Make a version of a package, new or already registered under another model's name; the version's number."""
    client = registry.tracker.client
    if isinstance(files, Package):  # else its files lie in the run, and are never written again
        client.log_artifacts(begun.run, str(files.folder), ARTIFACTS)
    if not client.search_registered_models(f"name = '{registry.model}'"):
        client.create_registered_model(registry.model)
    tags, source = label.tags | {TOKEN_TAG: begun.details["token"]}, f"runs:/{begun.run}/{ARTIFACTS}"
    made = client.create_model_version(registry.model, source, begun.run, tags, description=label.description)
    return str(made.version)


def _version_tags(registry: Registry, metadata: ModelMetadata, verdict: Event) -> dict[str, str]:
    """What a version says of itself, for searches in the registry."""
    tags, record = RunTags.of(registry.tracker.client.get_run(verdict.run)), verdict.evidence.record
    return {
        "study": tags.study or "",
        "recipe_digest": metadata.recipe_digest,
        "data_digest": metadata.data_digest,
        "split_digest": metadata.split_digest,
        "test_split": verdict.split or "",
        "git_commit": tags.commit or "",
        "verdict": "; ".join(f"{result.rule}: {result.number}" for result in record.verdict.results)[:_TAG_LIMIT],
        "against": record.opponent_run or record.opponent,
        "ledger_event": str(verdict.id),
    }
