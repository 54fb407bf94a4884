"""Who is champion: judged on the test split, packed, registered, and served by an alias that moves last.

Every change is claimed in the ledger before its first effect and closed there after its last (see ledger.py). A kill at any
point leaves the old champion's alias where it was, or the new one's complete: `settle`, which every command calls first,
finishes what has its version and undoes what has none.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock, Timeout
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

from pipeline.classifier import Classifier, Facts
from pipeline.errors import DataError, Refused, UserError
from pipeline.registry import export, test_split
from pipeline.registry.gate import Rules, Side, Verdict, judge
from pipeline.registry.ledger import (
    LOOK,
    PASSED,
    PROMOTED,
    REFUSED,
    ROLLED_BACK,
    UNDONE,
    Champion,
    Event,
    Ledger,
)
from pipeline.registry.package import MODEL, Package, package
from pipeline.tracking.models import find_model
from pipeline.tracking.runs import MlflowTracker, StudyRuns

CHAMPION, PREVIOUS = "champion", "previous"  # aliases
ARTIFACTS = "model"  # where a package lies among its run's artifacts
LOOKS = "looks"  # the folder of what was predicted, beside the ledger
_DIGEST = "sha256."  # before a file's name, a version's tag
_TOKEN = "promotion"  # a version's tag: the promotion that made it
_DESCRIPTION = 5000  # characters; the column's width


class Observer(Protocol):
    """Sees a promotion happen; for a person at a terminal."""

    def said(self, line: str) -> None:
        """What is done, found or repaired."""

    def judged(self, verdict: Verdict, challenger: str, other: str) -> None:
        """The verdict is in the ledger."""


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

    def packed_elsewhere(self, run: str) -> ModelVersion | None:
        """A version of any registered model whose files are those of the run."""
        return next(iter(self._versions(run)), None)

    def run_of(self, version: str) -> str:
        """The run of a version; UserError where there is no such version, or it is of no run."""
        try:
            run = self.tracker.client.get_model_version(self.model, version).run_id
        except MlflowException:
            run = None
        if not run:
            raise UserError(f"VERSION {version}: {self.model} has no such version of a run; make ui shows those there are")
        return run

    def champion(self) -> Champion | None:
        """The ledger's; UserError where the alias names another version: somebody moved it, and it is said how to go on."""
        reigns = self.ledger.reigns(self.model)
        now = reigns[-1] if reigns else None
        found = self.alias(CHAMPION)
        if found == (now.version if now else None):
            return now
        lines = [
            f"{self.model}: MLflow's alias champion names {_version(found)}, but by the ledger ({self.ledger.home}) it is "
            f"{_version(now.version if now else None)}: somebody moved it by hand, or from another folder mlruns",
        ]
        if found:
            lines.append(f"  make rollback VERSION={found} REASON=... takes the registry's word for it")
        if now:
            lines.append(f"  make rollback VERSION={now.version} REASON=... takes the ledger's")
        raise UserError(lines)

    def _versions(self, run: str) -> list[ModelVersion]:
        return list(self.tracker.client.search_model_versions(f"run_id = '{run}'"))


@contextlib.contextmanager
def alone(home: Path) -> Iterator[None]:
    """The only promotion or rollback of a folder mlruns; Refused at once where another is under way."""
    lock = FileLock(home / "promotion.lock")
    try:
        with lock.acquire(timeout=0):
            yield
    except Timeout:
        raise Refused(f"{home}: another promotion or rollback is under way; wait for it, and try again") from None


def settle(tracker: MlflowTracker, ledger: Ledger, said: Callable[[str], None]) -> None:
    """Finish or undo what was cut off; call it `alone`, so that whoever began it is gone."""
    for begun in ledger.cut_off():
        registry = Registry(tracker, ledger, begun.model)
        what = f"a {'rollback' if begun.details['kind'] == ROLLED_BACK else 'promotion'} of {begun.model}, cut off after {begun.time}"
        version, over, found = registry.made_by(begun), begun.details["over"], registry.alias(CHAMPION)
        if version is not None and found in (over, version):
            _move(registry, begun, version)
            said(f"{what}, was finished: {_version(version)} is champion")
        else:
            why = "its version was not registered yet" if version is None else "the alias was moved by hand meanwhile"
            ledger.end(begun, UNDONE, version, f"cut off: {why}")
            said(f"{what}, was undone ({why}): {_version(found)} is champion; the same command does it")


def _move(registry: Registry, begun: Event, version: str) -> None:
    """The end of every change, done again without harm: `champion` is the last thing that anybody sees move."""
    registry.point(PREVIOUS, begun.details["previous"])
    registry.point(CHAMPION, version)
    registry.ledger.end(begun, begun.details["kind"], version)


def _version(number: str | None) -> str:
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
            raise UserError(f"{registry.model}: {'the champion is its first' if reigns else 'has no champion'}; nothing to go back to")
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
    observer: Observer,
    forced: str = "",
    chosen: str = "",
) -> Champion:
    """Judge a run's model against the champion and make it champion; call it `alone` and after `settle`.

    Does nothing where it is champion. A run that was judged on the same split is not judged again, but where `forced`,
    which is the reason. `chosen` is how the run was chosen, for the record. Refused where a rule, or that one, says no.
    """
    champion = registry.champion()
    if champion and champion.run == run_id:
        observer.said(f"run {run_id} is champion already, {registry.model} {_version(champion.version)}: nothing to do")
        return champion
    with tempfile.TemporaryDirectory() as name:
        gate = _Gate(registry, rules, data_dir, observer, Path(name), forced, chosen)
        challenger = gate.of_run(run_id, "challenger")
        verdict = gate.verdict(challenger, champion)
        if not verdict.details["verdict"]["passed"]:
            raise Refused(Verdict.from_json(verdict.details["verdict"]).failed + _way_out(verdict, run_id))
        version = registry.version_of(run_id)
        begun = registry.ledger.begin(
            PROMOTED,
            registry.model,
            run_id,
            champion,
            version=version,
            previous=champion.version if champion else None,
            reason=verdict.reason,
        )
        try:
            _move(registry, begun, version or _register(registry, begun, challenger, verdict, Path(name) / "package"))
        except UserError as error:  # nobody was killed: nothing is left to the next command
            if version is None and registry.made_by(begun) is None:
                registry.ledger.end(begun, UNDONE, None, str(error)[:500])
            raise
    return registry.ledger.reigns(registry.model)[-1]


def _way_out(verdict: Event, run_id: str) -> list[str]:
    """Where the control, the first in line, beats the challenger, it may be champion itself."""
    if verdict.details["other"] != "control":
        return []
    return [f"  there is no champion yet: make promote RUN={verdict.details['against']} makes the control the first"]


@dataclass(frozen=True)
class _Model:
    """A model that is judged: its files, and what it is called."""

    run: str
    name: str
    facts: Facts
    folder: Path  # of its checkpoint
    onnx: Path


@dataclass(frozen=True)
class _Gate:
    """What one judgement needs."""

    registry: Registry
    rules: Rules
    data_dir: Path
    observer: Observer
    folder: Path  # a temporary one
    forced: str
    chosen: str

    def of_run(self, run_id: str, name: str) -> _Model:
        """The model of a run, exported as it would be served."""
        folder = self.folder / name
        tracker = self.registry.tracker
        with find_model(self.registry.ledger.home, tracker.uri, run_id) as found:
            os.rename(found.folder, folder)
            found.folder.mkdir()
        classifier = Classifier.load(folder, torch.device("cpu"))
        export.export_onnx(classifier, self.folder / f"{name}.onnx")
        return _Model(run_id, name, classifier.facts, folder, self.folder / f"{name}.onnx")

    def of_champion(self, champion: Champion) -> _Model:
        """The champion as it is served; its files are those that were registered."""
        registry = self.registry
        tags = registry.tracker.client.get_model_version(registry.model, champion.version).tags
        digests = {key.removeprefix(_DIGEST): value for key, value in tags.items() if key.startswith(_DIGEST)}
        what = f"{registry.model} {_version(champion.version)}"
        try:
            folder = Path(registry.tracker.client.download_artifacts(champion.run, ARTIFACTS, str(self.folder)))
        except (MlflowException, OSError) as error:
            raise UserError(f"{what}: its files can't be read ({str(error).splitlines()[0]}); make rollback REASON=... goes back") from None
        wrong = [name for name, digest in digests.items() if not _has_digest(folder / name, digest)]
        if wrong or MODEL not in digests:
            raise UserError(f"{what}: {', '.join(wrong) or MODEL}: not what was registered; make rollback REASON=... goes back")
        facts = Classifier.load(folder, torch.device("cpu")).facts
        return _Model(champion.run, f"champion, version {champion.version}", facts, folder, folder / MODEL)

    def verdict(self, challenger: _Model, champion: Champion | None) -> Event:
        """The ledger's: a former one where there is one that holds, else a new one."""
        dataset = challenger.facts.recipe.data.dataset
        split = test_split.digest_of(dataset, self.data_dir)
        control = None if champion else _control(self.registry.tracker, challenger.run)
        against = champion.run if champion else control
        former = self._former(challenger.run, split)
        if former and not self.forced:
            self._stands(former, against)
            self.observer.said(f"judged already, {former.time}: passed; the test split is not opened again")
            return former
        if champion:
            other = self.of_champion(champion)
        elif control is None or control == challenger.run:
            other = None
            what = "is the control itself" if control else "belongs to no study"
            self.observer.said(
                f"no champion yet, and the challenger {what}: as the first champion it has to be better than a constant answer"
            )
        else:
            other = self.of_run(control, "control")
        return self._judged(challenger, other, split)

    def _former(self, run: str, split: str) -> Event | None:
        events = self.registry.ledger.events()
        return next((e for e in reversed(events) if e.kind in (PASSED, REFUSED) and (e.run, e.split) == (run, split)), None)

    def _stands(self, former: Event, against: str | None) -> None:
        """Refused, with the former verdict, where it isn't one on which this promotion can rest."""
        again = 'FORCE=1 REASON="..." judges it again, and the ledger keeps the reason'
        when = f"run {former.run}: was judged on this test split by {former.user}, {former.time}"
        if former.kind == REFUSED:
            lines = Verdict.from_json(former.details["verdict"]).failed
            raise Refused([f"{when}, and refused; {again}", *(f"  {line}" for line in lines)])
        since = [e for e in self.registry.ledger.events(former.model) if e.kind == PROMOTED and e.run == former.run and e.id > former.id]
        if since:
            raise Refused(
                [
                    f"{when}, passed and was champion as version {since[-1].version} of {former.model}, and is so no more; {again}",
                    f"  make rollback VERSION={since[-1].version} REASON=... brings it back",
                ]
            )
        if former.model != self.registry.model or former.details["against"] != against:
            raise Refused(f"{when}, and passed against run {former.details['against']}, which isn't what it has to beat now; {again}")

    def _judged(self, challenger: _Model, other: _Model | None, split: str) -> Event:
        if other and other.facts.classes != challenger.facts.classes:
            raise UserError(
                f"{self.registry.model}: the {other.name} knows other classes ({', '.join(other.facts.classes[:5])}, ...) than the "
                f"challenger ({', '.join(challenger.facts.classes[:5])}, ...); MODEL=... keeps another champion for them"
            )
        files = {}
        labels, its = self._look(challenger, challenger, split, files)
        theirs = None
        if other:
            also, theirs = self._look(other, challenger, split, files)
            if not np.array_equal(labels, also):
                raise DataError(f"{split[:12]}: stored labels differ from the split's; remove {self.registry.ledger.home / LOOKS}")
        latency = _latencies([m for m in (challenger, other) if m])
        sides = [Side(p, latency[m.run], m.onnx.stat().st_size) for m, p in ((challenger, its), (other, theirs)) if m]
        name = "control" if other and other.name == "control" else "champion"
        verdict = judge(
            sides[0],
            sides[1] if other else None,
            labels,
            challenger.facts.classes,
            self.rules,
            _seed_accuracies(self.registry.tracker, challenger.run),
            name,
        )
        details = {
            "against": other.run if other else None,
            "other": name if other else "constant answer",
            "verdict": verdict.as_json(),
            "rules": self.rules.model_dump(),
            "recipe": challenger.facts.recipe_digest,
            "images": len(labels),
            "predictions": files,
        }
        self.observer.judged(verdict, f"run {challenger.run}", other.name if other else "a constant answer")
        event = self.registry.ledger.record(
            PASSED if verdict.passed else REFUSED,
            self.registry.model,
            challenger.run,
            split=split,
            reason=self.forced or self.chosen,
            details=details,
        )
        self.registry.tracker.client.log_dict(challenger.run, _evidence(event), f"gate/verdict-{event.id}.json")
        return event

    def _look(
        self, model: _Model, challenger: _Model, split: str, files: dict[str, str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Labels (N,) and probabilities (N, C) on the test split: stored ones, else new ones. Written down first."""
        ledger = self.registry.ledger
        path = ledger.home / LOOKS / f"{model.run}-{split[:16]}.parquet"
        stored = _stored(ledger, model.run, split, path)
        purpose = "may it be promoted?" if model is challenger else f"compared with run {challenger.run}"
        details = {"recipe": model.facts.recipe_digest, "from": "stored predictions" if stored else "images"}
        reason = f"{purpose} forced: {self.forced}" if self.forced else purpose
        ledger.record(LOOK, self.registry.model, model.run, split=split, reason=reason, details=details)
        if not stored:
            data, facts = challenger.facts.recipe.data, model.facts
            images = test_split.open_test_split(data.dataset, facts.recipe.data.image_size, self.data_dir, facts.classes)
            found = export.run(export.session(model.onnx), export.as_pixels(images.images))
            _write(path, images.labels.numpy(), found)
        files[model.run] = _sha256(path)
        return _read(path)


def _register(registry: Registry, begun: Event, challenger: _Model, verdict: Event, folder: Path) -> str:
    """Pack the model, put the files into its run, and make a version of them; the version's number."""
    client = registry.tracker.client
    packed = registry.packed_elsewhere(challenger.run)  # the files of another version are never overwritten
    if packed:
        digests = {key: value for key, value in packed.tags.items() if key.startswith(_DIGEST)}
        card = packed.description or ""
    else:
        made = package(registry.tracker, challenger.run, challenger.folder, folder, _evidence(verdict))
        digests, card = {f"{_DIGEST}{name}": value for name, value in made.sha256.items()}, made.card
        client.log_artifacts(challenger.run, str(folder), ARTIFACTS)
    with contextlib.suppress(MlflowException):  # it is there already; if not so, the next call says why
        client.create_registered_model(registry.model)
    run = client.get_run(challenger.run)
    tags = _tags(run, challenger.facts, verdict) | digests | {_TOKEN: begun.details["token"]}
    source = f"runs:/{challenger.run}/{ARTIFACTS}"
    return str(client.create_model_version(registry.model, source, challenger.run, tags, description=card[:_DESCRIPTION]).version)


def _tags(run: Run, facts: Facts, verdict: Event) -> dict[str, str]:
    """What a version says of itself, for searches in the registry."""
    findings = verdict.details["verdict"]["findings"]
    return {
        "study": run.data.tags.get("study", ""),
        "recipe_digest": facts.recipe_digest,
        "data_digest": facts.data_digest,
        "split_digest": facts.split_digest,
        "test_split": verdict.split or "",
        "git_commit": run.data.tags.get(MLFLOW_GIT_COMMIT, ""),
        "verdict": "; ".join(f"{f['rule']}: {f['number']}" for f in findings)[:_DESCRIPTION],
        "against": verdict.details["against"] or verdict.details["other"],
        "ledger_event": str(verdict.id),
    }


def _evidence(verdict: Event) -> dict[str, Any]:
    """The verdict as it goes with the model."""
    names = ("against", "other", "verdict", "rules", "recipe", "images")
    return {
        "run": verdict.run,
        "judged": verdict.time,
        "by": verdict.user,
        "test_split": verdict.split,
        "reason": verdict.reason,
        **{name: verdict.details[name] for name in names},
    }


# ---------------------------------------------------------------------------------------------- what is found in MLflow


def _study_of(tracker: MlflowTracker, run: Run) -> StudyRuns | None:
    name, experiment = run.data.tags.get("study"), run.info.experiment_id
    return next((s for s in tracker.studies() if (s.name, s.experiment) == (name, experiment)), None)


def _control(tracker: MlflowTracker, run_id: str) -> str | None:
    """The finished control of the run's study: the trial that is called so, else trial 0; None outside a study."""
    study = _study_of(tracker, tracker.client.get_run(run_id))
    if study is None:
        return None
    runs = [run for run in _finished(tracker, study) if run.data.tags.get("role") == "trial"]
    named = [run for run in runs if (run.info.run_name or "").endswith("(control)")]
    first = [run for run in runs if run.data.tags.get("trial") == "0"]
    found = (named or first)[:1]
    if not found:
        raise UserError(f"{study.name}: has no finished control to compare with, and there is no champion; run the study on")
    return found[0].info.run_id


def _seed_accuracies(tracker: MlflowTracker, run_id: str) -> list[float]:
    """Validation accuracies of the finished runs of the study that differ from this one by their seed at most."""
    run = tracker.client.get_run(run_id)
    study = _study_of(tracker, run)
    if study is None:
        return []
    found = {
        other.data.params.get("training.seed"): other.data.metrics["val/accuracy"]
        for other in _finished(tracker, study)
        if _but_seed(other.data.params) == _but_seed(run.data.params) and "val/accuracy" in other.data.metrics
    }
    return list(found.values())


def _but_seed(params: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in params.items() if name != "training.seed"}


def _finished(tracker: MlflowTracker, study: StudyRuns) -> list[Run]:
    """Oldest first."""
    query = f"tags.study = '{study.name}' and tags.state = 'finished'"
    order = ["attributes.start_time ASC"]
    return list(tracker.client.search_runs([study.experiment], query, order_by=order, max_results=50_000))


# ------------------------------------------------------------------------------------------- predictions that are kept


def _stored(ledger: Ledger, run: str, split: str, path: Path) -> bool:
    """Whether the file is one whose digest a verdict in the ledger names."""
    known = {e.details["predictions"].get(run) for e in ledger.events() if e.kind in (PASSED, REFUSED) and e.split == split}
    return path.is_file() and _sha256(path) in known


def _write(path: Path, labels: np.ndarray, probabilities: np.ndarray) -> None:
    """A row per image, in the split's order; whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {"label": pa.array(labels, pa.int64()), "probabilities": pa.array(list(probabilities), pa.list_(pa.float32()))}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    pq.write_table(pa.table(rows), new)
    os.replace(new, path)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return table["label"].to_numpy(), np.array(table["probabilities"].to_pylist(), dtype=np.float32)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _has_digest(path: Path, digest: str) -> bool:
    return path.is_file() and _sha256(path) == digest


def _latencies(models: list[_Model]) -> dict[str, float]:
    """Milliseconds of one image by run, on this machine: the least of three medians, measured in turn."""
    found: dict[str, list[float]] = {model.run: [] for model in models}
    for _ in range(3):
        for model in models:
            found[model.run].append(export.latency_ms(model.onnx, model.facts.recipe.data.image_size))
    return {run: min(times) for run, times in found.items()}
