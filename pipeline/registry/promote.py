"""Who is champion: judged on the test split, packed, registered, and served by an alias that moves last.

Every change is claimed in the ledger before its first effect and closed there after its last (see ledger.py). A kill at any
point leaves the old champion's alias where it was, or the new one's complete: `settle`, which every command calls first,
finishes what has its version and undoes what has none.
"""

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

from pipeline.errors import PromotionRefused, UserError
from pipeline.inference.classifier import ModelMetadata
from pipeline.registry.candidate_evaluation import (
    CONTROL,
    CandidateEvaluation,
    EvaluatedModel,
    EvaluationObserver,
    evidence,
)
from pipeline.registry.card import description
from pipeline.registry.gate import Rules, Verdict
from pipeline.registry.ledger import PROMOTED, REFUSED, ROLLED_BACK, UNDONE, Champion, Event, Ledger
from pipeline.registry.package import CARD, package
from pipeline.tracking import queries
from pipeline.tracking.models import DIGEST_TAG
from pipeline.tracking.models import digests as digests_of
from pipeline.tracking.store import is_active
from pipeline.tracking.tracker import MlflowTracker

CHAMPION, PREVIOUS = "champion", "previous"  # aliases
ARTIFACTS = "model"  # where a package lies among its run's artifacts
_TOKEN = "promotion"  # a version's tag: the promotion that made it
_TAG_LIMIT = 5000  # characters; the column's width


@dataclass(frozen=True)
class Registry:
    """One registered model in MLflow's registry, and the ledger of what may happen to it."""

    tracker: MlflowTracker
    ledger: Ledger
    model: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w][\w.-]{0,99}", self.model):
            raise UserError(f"MODEL {self.model}: should be letters, digits, - _ and . only, and start with no sign")

    def alias(self, name: str) -> str | None:
        """The version that an alias names, or None."""
        try:
            return str(self.tracker.client.get_model_version_by_alias(self.model, name).version)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def point(self, alias: str, version: str | None) -> None:
        """Set an alias, or take it away."""
        client = self.tracker.client
        if version is not None:
            client.set_registered_model_alias(self.model, alias, version)
        elif self.alias(alias) is not None:
            client.delete_registered_model_alias(self.model, alias)

    def made_by(self, begun: Event) -> str | None:
        """The version that a begun change has, or made."""
        if begun.version is not None:
            return begun.version
        found = [v for v in self._versions(begun.run) if v.tags.get(_TOKEN) == begun.details["token"]]
        return str(found[0].version) if found else None

    def version_of(self, run: str) -> str | None:
        """The newest version that is this run's, or None."""
        numbers = [int(version.version) for version in self._versions(run) if version.name == self.model]
        return str(max(numbers)) if numbers else None

    def packed(self, run: str) -> ModelVersion | None:
        """A version, of any registered model, whose files are those of the run."""
        return next(iter(self._versions(run)), None)

    def run_of(self, version: str) -> str:
        """The run of a version; UserError where there is no such version, or it is of no run."""
        try:
            run = self.tracker.client.get_model_version(self.model, version).run_id
        except MlflowException:
            run = None
        if not run:
            raise UserError(
                f"VERSION {version}: {self.model} has no such version of a run; make ui shows those there are"
            )
        return run

    def champion(self) -> Champion | None:
        """The ledger's; UserError where the alias names another version: somebody moved it, and it is said how to go on."""
        reigns = self.ledger.reigns(self.model)
        now = reigns[-1] if reigns else None
        found = self.alias(CHAMPION)
        if found == (now.version if now else None):
            return now
        if name := self._new_name(reigns):
            raise UserError(
                f"{self.model}: is called {name} in MLflow by now, and the ledger ({self.ledger.home}) knows it by the old "
                f"name: rename it back there, or MODEL={name} begins a ledger of its own"
            )
        lines = [
            f"{self.model}: MLflow's alias champion names {_named(found)}, but by the ledger ({self.ledger.home}) it is "
            f"{_named(now.version if now else None)}: somebody moved or deleted it by hand, or from another folder mlruns",
        ]
        if found:
            lines.append(f"  make rollback VERSION={found} REASON=... takes the registry's word for it")
        if now:
            lines.append(f"  make rollback VERSION={now.version} REASON=... takes the ledger's")
        raise UserError(lines)

    def gone(self) -> list[Champion]:
        """The versions that were champion, by the ledger, and were deleted in MLflow since."""
        gone = [reign for reign in dict.fromkeys(self.ledger.reigns(self.model)) if not self._is_there(reign)]
        return [] if gone and self._new_name(gone) else gone

    def _new_name(self, reigns: Sequence[Champion]) -> str | None:
        """What the registered model is called by now, where a person renamed it: these versions are under that name."""
        if self.tracker.client.search_registered_models(f"name = '{self.model}'"):
            return None
        known = {(reign.version, reign.run) for reign in reigns}
        found = [version for run in {reign.run for reign in reigns} for version in self._versions(run)]
        return next((v.name for v in found if (str(v.version), v.run_id) in known), None)

    def _is_there(self, reign: Champion) -> bool:
        try:
            found = self.tracker.client.get_model_version(self.model, reign.version)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        return found.run_id == reign.run  # of a model that was deleted and made again the numbers begin anew

    def _versions(self, run: str) -> list[ModelVersion]:
        """Those that a promotion made; one registered by hand has no digests and is never served."""
        found = self.tracker.client.search_model_versions(f"run_id = '{run}'")
        return [version for version in found if _TOKEN in version.tags]


@contextlib.contextmanager
def registry_lock(home: Path) -> Iterator[None]:
    """The only promotion or rollback of a folder mlruns; Refused at once where another is under way."""
    lock = FileLock(home / "promotion.lock")
    try:
        with lock.acquire(timeout=0):
            yield
    except Timeout:
        raise PromotionRefused(
            f"{home}: another promotion or rollback is under way; wait for it, and try again"
        ) from None


def settle(tracker: MlflowTracker, ledger: Ledger, said: Callable[[str], None]) -> None:
    """Finish or undo what was cut off, and take out of the ledger's reigns what was deleted in MLflow.

    Call it `alone`, so that whoever began it is gone.
    """
    for begun in ledger.cut_off():
        registry = Registry(tracker, ledger, begun.model)
        kind = "rollback" if begun.details["kind"] == ROLLED_BACK else "promotion"
        what = f"a {kind} of {begun.model}, begun {begun.time} and cut off"
        version, over, found = registry.made_by(begun), begun.details["over"], registry.alias(CHAMPION)
        if version is not None and found in (over, version):
            _move(registry, begun, version)
            said(f"{what}, was finished: {_named(version)} is champion")
        else:
            why = "its version was not registered yet" if version is None else "the alias was moved by hand meanwhile"
            ledger.end(begun, UNDONE, version, f"cut off: {why}")
            said(f"{what}, was undone ({why}): {_named(found)} is champion; the same command does it")
    for model in dict.fromkeys(event.model for event in ledger.events()):
        for gone in (registry := Registry(tracker, ledger, model)).gone():
            was = "the champion" if gone == ledger.reigns(model)[-1] else "a former champion"
            ledger.lose(model, gone, f"deleted in MLflow; was {was}")
            said(f"{model} {_named(gone.version)}, {was}, was deleted in MLflow: the ledger has it as gone")


def _move(registry: Registry, begun: Event, version: str) -> None:
    """The end of every change, done again without harm: `champion` is the last thing that anybody sees move."""
    registry.point(PREVIOUS, begun.details["previous"])
    registry.point(CHAMPION, version)
    registry.ledger.end(begun, begun.details["kind"], version)


def _named(number: str | None) -> str:
    return "no version" if number is None else f"version {number}"


# ---------------------------------------------------------------------------------------------------------- rollback


def roll_back(registry: Registry, version: str | None, reason: str) -> Champion:
    """Make the champion before, or `version`, champion again; call it `alone` and after `settle`.

    UserError where there is none before, or no reason.
    """
    if not reason.strip():
        raise UserError('REASON: say why: make rollback REASON="slower in production than it was here"')
    reigns = registry.ledger.reigns(registry.model)
    if version is None:
        registry.champion()  # alias and ledger agree
        if len(reigns) < 2:
            why = "its champion is the first" if reigns else "has no champion"
            raise UserError(f"{registry.model}: {why}; there is nothing to go back to")
        target = reigns[-2]
    else:
        target = Champion(version, registry.run_of(version))
        if reigns and target == reigns[-1] and registry.alias(CHAMPION) == version:
            raise UserError(f"VERSION {version}: is champion already")
    earlier = reigns[: reigns.index(target)] if target in reigns else reigns
    begun = registry.ledger.begin(
        ROLLED_BACK,
        registry.model,
        target.run,
        reigns[-1] if reigns else None,
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
    """Judge a run's model against the champion and make it champion; call it `alone` and after `settle`.

    Does nothing where it is champion. A run that was judged on the same split is judged again only if `forced` says why.
    `chosen` is how the run was chosen, for the record; `dataset` is where its data set lies, if that is not known. Refused
    where a rule, or that one, says no.
    """
    champion = registry.champion()
    if champion and champion.run == run_id:
        observer.said(f"run {run_id} is champion already, {registry.model} {_named(champion.version)}: nothing to do")
        return champion
    _check_that_it_is_a_candidate(registry.tracker, run_id)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = CandidateEvaluation(
            registry.tracker, registry.ledger, registry.model, rules, data_dir, folder, observer, dataset
        )
        there = registry.packed(run_id)
        challenger = bench.of_version(there, "challenger") if there else bench.of_run(run_id, "challenger")
        verdict = bench.verdict(challenger, champion, forced, chosen)
        if verdict.kind == REFUSED:
            raise PromotionRefused(Verdict.from_json(verdict.details["verdict"]).failed + _way_out(verdict))
        version = registry.version_of(run_id)
        if there is None:
            _pack(bench, challenger, verdict, folder / "package")
        begun = registry.ledger.begin(
            PROMOTED,
            registry.model,
            run_id,
            champion,
            version=version,
            previous=champion.version if champion else None,
            reason=verdict.reason,
        )
        _move(registry, begun, version or _register(registry, begun, challenger, verdict, folder / "package"))
    return registry.ledger.reigns(registry.model)[-1]


def _pack(bench: CandidateEvaluation, challenger: EvaluatedModel, verdict: Event, folder: Path) -> None:
    """The package of a model that passed, with the ONNX file that was judged."""
    onnx_file = bench.as_judged(challenger, verdict)
    package(bench.tracker, challenger.run, challenger.folder, folder, evidence(verdict), onnx_file)


def _check_that_it_is_a_candidate(tracker: MlflowTracker, run_id: str) -> None:
    """UserError for a run that a person deleted, and for a reproduction.

    Its bits are another run's: under a second name the test split would judge one model twice.
    """
    try:
        run = tracker.client.get_run(run_id)
    except MlflowException:
        return  # find_model says so
    if not is_active(run):
        raise UserError(f"RUN {run_id}: was deleted in MLflow; {queries.how_to_restore(tracker, run)}, or take another")
    if first := run.data.tags.get("reproduces"):
        raise UserError(f"RUN {run_id}: a reproduction, which is no candidate; make promote RUN={first} judges the run")


def _way_out(verdict: Event) -> list[str]:
    if verdict.details["other"] != CONTROL:
        return []
    control = verdict.details["against"]
    return [
        f"  no champion yet, and not shown to be better than the control: make promote RUN={control} takes that one"
    ]


def _register(registry: Registry, begun: Event, challenger: EvaluatedModel, verdict: Event, packed: Path) -> str:
    """Put the package into its run, and make a version of it; the version's number."""
    client = registry.tracker.client
    there = registry.packed(challenger.run)
    if there:  # under another model's name: its files are never written again
        digests = {key: value for key, value in there.tags.items() if key.startswith(DIGEST_TAG)}
        card = there.description or ""
    else:
        client.log_artifacts(challenger.run, str(packed), ARTIFACTS)
        digests = {f"{DIGEST_TAG}{name}": digest for name, digest in digests_of(packed).items()}
        card = description((packed / CARD).read_text(encoding="utf-8"))
    if not client.search_registered_models(f"name = '{registry.model}'"):
        client.create_registered_model(registry.model)
    tags = _tags(registry, challenger.facts, verdict) | digests | {_TOKEN: begun.details["token"]}
    source = f"runs:/{challenger.run}/{ARTIFACTS}"
    return str(client.create_model_version(registry.model, source, challenger.run, tags, description=card).version)


def _tags(registry: Registry, facts: ModelMetadata, verdict: Event) -> dict[str, str]:
    """What a version says of itself, for searches in the registry."""
    tags = registry.tracker.client.get_run(verdict.run).data.tags
    findings = verdict.details["verdict"]["findings"]
    return {
        "study": tags.get("study", ""),
        "recipe_digest": facts.recipe_digest,
        "data_digest": facts.data_digest,
        "split_digest": facts.split_digest,
        "test_split": verdict.split or "",
        "git_commit": tags.get(MLFLOW_GIT_COMMIT, ""),
        "verdict": "; ".join(f"{its['rule']}: {its['number']}" for its in findings)[:_TAG_LIMIT],
        "against": verdict.details["against"] or verdict.details["other"],
        "ledger_event": str(verdict.id),
    }
