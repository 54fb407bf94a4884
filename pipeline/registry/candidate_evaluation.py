"""One judgement: the models as they would be served, their predictions on the test split, the verdict in the ledger."""

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion

from pipeline.errors import DataError, PromotionRefused, UserError
from pipeline.evaluation.significance import small_split_line
from pipeline.inference.classifier import Classifier, ModelMetadata
from pipeline.registry import export, test_split
from pipeline.registry.gate import Rules, Side, Verdict, decide
from pipeline.registry.ledger import GONE, LOOK, PASSED, PROMOTED, REFUSED, Champion, Event, Ledger
from pipeline.registry.package import MODEL
from pipeline.tracking import queries
from pipeline.tracking.intact import control_runs
from pipeline.tracking.models import find_model
from pipeline.tracking.queries import StudyRuns
from pipeline.tracking.run_data import LocatedData
from pipeline.tracking.tags import State
from pipeline.tracking.tracker import MlflowTracker

TEST_EVALUATIONS = "looks"  # the folder of what was predicted, beside the ledger
CONTROL, CONSTANT = "control", "constant answer"  # what a challenger has to beat where there is no champion


class EvaluationObserver(Protocol):
    """Sees a promotion happen; for a person at a terminal."""

    def said(self, line: str) -> None:
        """What is done, found or repaired."""

    def judged(self, verdict: Verdict, challenger: str, other: str) -> None:
        """The verdict is in the ledger."""


@dataclass(frozen=True)
class EvaluatedModel:
    """A model that is judged: its files, and what it is called."""

    run: str
    name: str
    facts: ModelMetadata
    folder: Path  # of its checkpoint, and of model.onnx once it is judged


@dataclass(frozen=True)
class CandidateEvaluation:
    """Where runs are judged for one registered model."""

    tracker: MlflowTracker
    ledger: Ledger
    model: str
    rules: Rules
    data_dir: Path
    folder: Path  # a temporary one
    observer: EvaluationObserver
    dataset: str | None = None  # where the challenger's data set lies; None: where it is known to have been

    def of_run(self, run_id: str, name: str) -> EvaluatedModel:
        """The model of a run. UserError where it has none."""
        return self._copied(run_id, run_id, name)

    def of_version(self, version: ModelVersion, name: str) -> EvaluatedModel:
        """A registered version as it is served; DataError where its files are not those that were registered."""
        return self._copied(f"models:/{version.name}/{version.version}", version.run_id or "", name)

    def of_champion(self, champion: Champion) -> EvaluatedModel:
        """The champion as it is served; DataError where its files are not those that were registered."""
        uri = f"models:/{self.model}/{champion.version}"
        return self._copied(uri, champion.run, f"champion, version {champion.version}")

    def _copied(self, wanted: str, run: str, name: str) -> EvaluatedModel:
        folder = self.folder / run
        with find_model(self.ledger.home, self.tracker.uri, wanted) as found:
            shutil.copytree(found.folder, folder)
        return EvaluatedModel(run, name, Classifier.load(folder, torch.device("cpu")).facts, folder)

    def verdict(self, challenger: EvaluatedModel, champion: Champion | None, forced: str, chosen: str) -> Event:
        """The challenger's in the ledger: the former one where it still holds, else a new one.

        Refused where a former one doesn't hold, or says no, and the run isn't judged again because `forced` says why.
        `chosen` is how the run was chosen, for the record. DataError where the challenger's data set is nowhere as it was:
        what changed might have been among the images that it was trained on.
        """
        data = export.find_data_of(challenger.facts, self.tracker, self.data_dir, self.dataset, download=False)
        split = test_split.digest_of(data.dataset, data.data_dir)
        against = champion.run if champion else control_of(self.tracker, challenger.run)
        former = self._former(challenger.run, split)
        if former and not forced:
            self._check_that_it_holds(former, against)
            self.observer.said(f"judged already, {former.time}: passed; the test split is not opened again")
            return former
        other = None
        if champion:
            other = self.of_champion(champion)
        elif against:
            other = self.of_run(against, CONTROL)
        else:
            self.observer.said(
                "no champion yet, and no other model to beat: the first champion must beat a constant answer"
            )
        return self._judged(challenger, other, data, split, forced, forced or chosen)

    def _former(self, run: str, split: str) -> Event | None:
        verdicts = [e for e in self.ledger.events() if e.kind in (PASSED, REFUSED) and (e.run, e.split) == (run, split)]
        return verdicts[-1] if verdicts else None

    def _check_that_it_holds(self, former: Event, against: str | None) -> None:
        again = 'FORCE=1 REASON="..." judges it again, and the ledger keeps the reason'
        when = f"run {former.run}: was judged on this test split by {former.user}, {former.time}"
        if former.kind == REFUSED:
            lines = Verdict.from_json(former.details["verdict"]).failed
            raise PromotionRefused([f"{when}, and refused; {again}", *(f"  {line}" for line in lines)])
        later = [e for e in self.ledger.events(former.model) if e.run == former.run and e.id > former.id]
        if promoted := [event for event in later if event.kind == PROMOTED]:
            version = promoted[-1].version
            if any((event.kind, event.version) == (GONE, version) for event in later):
                raise PromotionRefused(
                    f"{when}, passed, and served as {former.model} version {version}, which was deleted in MLflow; {again}"
                )
            raise PromotionRefused(
                [
                    f"{when}, passed, and served as {former.model} version {version}, which was taken back; {again}",
                    f"  make rollback VERSION={version} REASON=... makes it champion without",
                ]
            )
        if former.model != self.model or former.details["against"] != against:
            beaten = former.details["against"] or f"a {CONSTANT}"
            raise PromotionRefused(f"{when}, and passed against {beaten}, which isn't what it has to beat now; {again}")

    def _judged(
        self,
        challenger: EvaluatedModel,
        other: EvaluatedModel | None,
        data: LocatedData,
        split: str,
        forced: str,
        reason: str,
    ) -> Event:
        classes = challenger.facts.classes
        if other and other.facts.classes != classes:
            raise UserError(
                f"{self.model}: the {other.name} knows other classes ({', '.join(other.facts.classes[:5])}, ...) than the "
                f"challenger ({', '.join(classes[:5])}, ...); MODEL=... keeps another champion for them"
            )
        self._export(challenger, data)
        if other:
            self._export(other)
        labels, its = self._look(challenger, data, split, f"is it to be promoted? {forced}".strip())
        sides = {challenger.run: its}
        if other:
            also, sides[other.run] = self._look(other, data, split, f"compared with run {challenger.run}")
            if not np.array_equal(labels, also):
                raise DataError(f"{self.ledger.home / TEST_EVALUATIONS}: two models' labels differ; remove the folder")
        latency = _latencies([challenger, other] if other else [challenger])
        found = {
            judged.run: Side(sides[judged.run], latency[judged.run], (judged.folder / MODEL).stat().st_size)
            for judged in (challenger, other)
            if judged
        }
        name = (CONTROL if other.name == CONTROL else "champion") if other else CONSTANT
        seeds = _seed_accuracies(self.tracker, challenger.run)
        verdict = decide(
            found[challenger.run], found[other.run] if other else None, labels, classes, self.rules, seeds, name
        )
        details = {
            "against": other.run if other else None,
            "other": name,
            "verdict": verdict.as_json(),
            "rules": self.rules.model_dump(),
            "recipe_digest": challenger.facts.recipe_digest,
            "images": len(labels),
            "right": {run: int((its.argmax(1) == labels).sum()) for run, its in sides.items()},
            "onnx": _sha256(challenger.folder / MODEL),
            "predictions": {run: _sha256(self._path(run, split)) for run in sides},
        }
        kind = PASSED if verdict.passed else REFUSED
        event = self.ledger.record(kind, self.model, challenger.run, split=split, reason=reason, details=details)
        self.observer.judged(verdict, f"run {challenger.run}", f"the {other.name if other else CONSTANT}")
        self.tracker.client.log_dict(challenger.run, evidence(event), f"gate/verdict-{event.id}.json")
        return event

    def _export(self, judged: EvaluatedModel, data: LocatedData | None = None) -> None:
        """Write the model as it would be served, if it isn't there, and compare it with torch, on its data where given."""
        path = judged.folder / MODEL
        if path.exists():
            return
        classifier = Classifier.load(judged.folder, torch.device("cpu"))
        export.export_onnx(classifier, path)
        if data:
            try:
                images = export.split_as_then(judged.facts, data.images).validation.images
            except DataError as error:
                self.observer.said(f"not compared with torch on the validation split, only on made-up images: {error}")
                return
            worst = export.check(classifier, path, images)
            self.observer.said(export.difference_line(worst, f"the {len(images):,} images of the validation split"))
            if line := small_split_line(len(images), judged.facts.recipe.data.validation_fraction):
                self.observer.said(line)

    def as_judged(self, challenger: EvaluatedModel, verdict: Event) -> Path:
        """The ONNX file that the verdict is about; Refused where exporting it once more doesn't give that."""
        self._export(challenger)
        path = challenger.folder / MODEL
        if _sha256(path) != verdict.details.get("onnx"):
            raise PromotionRefused(
                f"run {challenger.run}: exported now, its ONNX model isn't the one that was judged {verdict.time}; "
                'FORCE=1 REASON="..." judges it as it is now'
            )
        return path

    def _look(
        self, judged: EvaluatedModel, data: LocatedData, split: str, reason: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Labels (N,) and probabilities (N, C) on the test split: stored ones, else new ones. Written down first."""
        path = self._path(judged.run, split)
        stored = self._is_stored(judged.run, split)
        details = {"recipe_digest": judged.facts.recipe_digest, "from": "stored predictions" if stored else "images"}
        self.ledger.record(LOOK, self.model, judged.run, split=split, reason=reason, details=details)
        if not stored:
            size, classes = judged.facts.recipe.data.image_size, judged.facts.classes
            images = test_split.open_test_split(data.dataset, size, data.data_dir, classes)
            found = export.run_session(export.session(judged.folder / MODEL), export.as_pixels(images.images))
            _write(path, images.labels.numpy(), found)
        return _read(path)

    def _is_stored(self, run: str, split: str) -> bool:
        """Whether the file is one whose digest a verdict in the ledger names."""
        verdicts = [e for e in self.ledger.events() if e.kind in (PASSED, REFUSED) and e.split == split]
        path = self._path(run, split)
        return path.is_file() and _sha256(path) in {event.details["predictions"].get(run) for event in verdicts}

    def _path(self, run: str, split: str) -> Path:
        return self.ledger.home / TEST_EVALUATIONS / f"{run}-{split[:16]}.parquet"


def evidence(verdict: Event) -> dict[str, Any]:
    """A verdict as it goes with the model."""
    names = ("against", "other", "verdict", "rules", "recipe_digest", "images", "right", "onnx")
    known = {"run": verdict.run, "judged": verdict.time, "by": verdict.user, "test_split": verdict.split}
    return known | {"reason": verdict.reason} | {name: verdict.details.get(name) for name in names}


# ---------------------------------------------------------------------------------------------- what is found in MLflow


def control_of(tracker: MlflowTracker, run_id: str) -> str | None:
    """The control's run that the first champion has to beat; None outside a study, and for the control, whatever its seed.

    It is the finished trial that is called so, else trial 0. What finals trained is the best of several seeds, and meets
    the best of the control's: against a single one, luck alone won in up to 9 % with 5 seeds, 19 % with 10, not in 5 %
    (simulated). UserError where the study has no control.
    """
    run = tracker.client.get_run(run_id)
    study = _study_of(tracker, run)
    if study is None:
        return None
    runs = _finished(tracker, study)
    trials = [other for other in runs if other.data.tags.get("role") == "trial"]
    deleted = [
        other
        for other in queries.deleted_children(tracker, study.parent)
        if other.data.tags.get("role") == "trial" and other.data.tags.get("state") == State.FINISHED
    ]
    found = control_runs(trials)
    ids = {control.info.run_id for control in found or control_runs(deleted)}
    if ids & {run_id, run.data.tags.get("trial_run")}:
        return None
    if run.data.tags.get("role") != "final" and found:
        return found[0].info.run_id
    again = [other for other in runs if other.data.tags.get("trial_run") in ids]
    for length in (_epochs(run), *(_epochs(control) for control in found[:1])):  # EPOCHS= holds for all of some finals
        if alike := [other for other in again if _epochs(other) == length]:
            return max(alike, key=lambda other: other.data.metrics[study.objective]).info.run_id
    if found:
        return found[0].info.run_id
    raise UserError(
        f"{study.name}: has no finished control to compare with, and there is no champion; make study goes on with one "
        f"that did not finish; where it was deleted in MLflow, restore it, or make finals NAME={study.name} trains it anew"
    )


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


def _study_of(tracker: MlflowTracker, run: Run) -> StudyRuns | None:
    name, experiment = run.data.tags.get("study"), run.info.experiment_id
    return next((s for s in queries.studies(tracker) if (s.name, s.experiment) == (name, experiment)), None)


def _but_seed(params: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in params.items() if name not in ("training.seed", "data.dataset")}


def _epochs(run: Run) -> str | None:
    return run.data.params.get("training.epochs")


def _finished(tracker: MlflowTracker, study: StudyRuns) -> list[Run]:
    """The oldest first."""
    return [run for run in queries.children(tracker, study) if run.data.tags["state"] == State.FINISHED]


# ------------------------------------------------------------------------------------------- predictions that are kept


def _write(path: Path, labels: np.ndarray, probabilities: np.ndarray) -> None:
    """A row per image, in the split's order; whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {
        "label": pa.array(labels, pa.int64()),
        "probabilities": pa.array(list(probabilities), pa.list_(pa.float32())),
    }
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


def _latencies(models: list[EvaluatedModel]) -> dict[str, float]:
    """Milliseconds of one image by run, on this machine: the least of three medians, measured in turn."""
    found: dict[str, list[float]] = {model.run: [] for model in models}
    for _ in range(3):
        for model in models:
            found[model.run].append(export.latency_ms(model.folder / MODEL, model.facts.recipe.data.image_size))
    return {run: min(times) for run, times in found.items()}
