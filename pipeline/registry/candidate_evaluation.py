"""One candidate evaluated: the models as they would be served, their predictions on the test split, the verdict."""

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion

from pipeline.errors import DataError, PromotionRefused, UserError
from pipeline.evaluation.significance import small_split_line
from pipeline.inference.classifier import Classifier, ModelMetadata
from pipeline.registry import export, test_split
from pipeline.registry.gate import Evidence, GateRecord, ModelEvidence, Rules, Verdict, decide
from pipeline.registry.ledger import DELETED, PASSED, PROMOTED, REFUSED, TEST_EVALUATION, Champion, Event, Ledger
from pipeline.registry.package import MODEL
from pipeline.tracking import queries
from pipeline.tracking.intact import control_runs
from pipeline.tracking.models import find_model
from pipeline.tracking.queries import StudyRuns
from pipeline.tracking.run_data import LocatedData
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker

TEST_EVALUATIONS = "test_evaluations"  # the folder of the predictions, beside the ledger
CHAMPION, CONTROL, CONSTANT = "champion", "control", "constant answer"  # the opponents
_EVALUATE_AGAIN = "`--force` with `--reason` evaluates it again, and the ledger keeps the reason"


class EvaluationObserver(Protocol):
    """Sees a promotion happen; for a person at a terminal."""

    def note(self, line: str) -> None:
        """What is done, repaired or to be known."""

    def decided(self, verdict: Verdict, challenger: str, opponent: str) -> None:
        """The verdict is in the ledger."""


@dataclass(frozen=True)
class EvaluatedModel:
    """A model that is evaluated: its files, and what it is called."""

    run: str
    name: str
    metadata: ModelMetadata
    folder: Path  # of its checkpoint, and of model.onnx once it is exported


@dataclass(frozen=True, eq=False)
class TestEvaluation:
    """A model's predictions on the N images of the test split."""

    labels: np.ndarray  # int64 (N,)
    probabilities: np.ndarray  # float32 (N, C)

    @property
    def num_correct(self) -> int:
        """Images that it has right."""
        return int((self.probabilities.argmax(1) == self.labels).sum())


@dataclass(frozen=True)
class CandidateEvaluation:
    """Evaluates candidates for one registered model."""

    tracker: MlflowTracker
    ledger: Ledger
    model: str
    rules: Rules
    data_dir: Path
    folder: Path  # a temporary one
    observer: EvaluationObserver
    dataset: str | None = None  # where the challenger's data set lies; None: where it is known to have been

    def model_of_run(self, run_id: str, name: str) -> EvaluatedModel:
        """The model of a run. UserError where it has none."""
        return self._copy(run_id, run_id, name)

    def model_of_version(self, version: ModelVersion, name: str) -> EvaluatedModel:
        """A registered version as it is served; DataError where its files are not those that were registered."""
        return self._copy(f"models:/{version.name}/{version.version}", version.run_id or "", name)

    def model_of_champion(self, champion: Champion) -> EvaluatedModel:
        """The champion as it is served; DataError where its files are not those that were registered."""
        uri = f"models:/{self.model}/{champion.version}"
        return self._copy(uri, champion.run, f"champion, version {champion.version}")

    def _copy(self, wanted: str, run: str, name: str) -> EvaluatedModel:
        folder = self.folder / run
        with find_model(self.ledger.home, self.tracker.uri, wanted) as model:
            shutil.copytree(model.folder, folder)
        return EvaluatedModel(run, name, Classifier.load(folder, torch.device("cpu")).metadata, folder)

    # ------------------------------------------------------------------------------------------------------- verdicts

    def verdict(self, challenger: EvaluatedModel, champion: Champion | None, forced: str, chosen: str) -> Event:
        """The challenger's verdict in the ledger: the former one where it still holds, else a new one.

        Refused where a former one doesn't hold, or says no, and the run isn't evaluated again because `forced` says why.
        `chosen` is how the run was chosen, for the record. DataError where the challenger's data set can't be had as it
        was: what changed might have been among the images that it was trained on.
        """
        data = export.find_data_of(challenger.metadata, self.tracker, self.data_dir, self.dataset, download=False)
        split = test_split.digest_of(data.dataset, data.data_dir)
        opponent_run = champion.run if champion else control_of(self.tracker, challenger.run)
        former = self._former_verdict(challenger.run, split)
        if former and not forced:
            self._check_that_it_holds(former, opponent_run)
            self.observer.note(f"evaluated already, {former.time}: passed; the test split is not opened again")
            return former
        opponent = None
        if champion:
            opponent = self.model_of_champion(champion)
        elif opponent_run:
            opponent = self.model_of_run(opponent_run, CONTROL)
        else:
            self.observer.note(
                "no champion yet and no feasible control: the first champion must be better than a constant answer"
            )
        return self._new_verdict(challenger, opponent, data, split, forced, chosen)

    def _former_verdict(self, run: str, split: str) -> Event | None:
        verdicts = [e for e in self.ledger.events() if e.kind in (PASSED, REFUSED) and (e.run, e.split) == (run, split)]
        return verdicts[-1] if verdicts else None

    def _check_that_it_holds(self, former: Event, opponent_run: str | None) -> None:
        """PromotionRefused where it doesn't, and by the way out: evaluate again, roll back, or nothing."""
        subject, record = f"run {former.run}", former.evidence.record
        passed = f"was evaluated on this test split by {former.user}, {former.time}, and passed"
        if former.kind == REFUSED:
            rule = f"was evaluated on this test split by {former.user}, {former.time}, and refused"
            details = [line for problem in record.verdict.problems for line in problem.lines]
            raise PromotionRefused(subject, rule, _EVALUATE_AGAIN, details)
        later = [e for e in self.ledger.events(former.model) if e.run == former.run and e.id > former.id]
        if promoted := [event for event in later if event.kind == PROMOTED]:
            version = promoted[-1].version
            served = f"{passed}, and served as {former.model} version {version}"
            if any((event.kind, event.version) == (DELETED, version) for event in later):
                raise PromotionRefused(subject, f"{served}, which was deleted in MLflow", _EVALUATE_AGAIN)
            remedy = f"`rollback --version {version}` makes it champion without"
            raise PromotionRefused(subject, f"{served}, which was rolled back", _EVALUATE_AGAIN, [remedy])
        if former.model != self.model or record.opponent_run != opponent_run:
            beaten = record.opponent_run or f"a {CONSTANT}"
            rule = f"{passed} against {beaten}, which isn't its opponent now"
            raise PromotionRefused(subject, rule, _EVALUATE_AGAIN)

    def _new_verdict(
        self,
        challenger: EvaluatedModel,
        opponent: EvaluatedModel | None,
        data: LocatedData,
        split: str,
        forced: str,
        chosen: str,
    ) -> Event:
        if opponent:
            self._check_classes(challenger, opponent)
        models = [challenger, opponent] if opponent else [challenger]
        for model in models:
            self._export(model, data if model is challenger else None)
        reasons = [f"is it to be promoted? {forced}".strip(), f"compared with run {challenger.run}"]
        evaluations = [self._evaluate(m, data, split, reason) for m, reason in zip(models, reasons, strict=False)]
        if not np.array_equal(evaluations[0].labels, evaluations[-1].labels):
            folder = self.ledger.home / TEST_EVALUATIONS
            raise DataError(str(folder), "the labels of two models differ", "remove the folder")
        opponent_name = (CONTROL if opponent.name == CONTROL else CHAMPION) if opponent else CONSTANT
        sides = [
            ModelEvidence(evaluation.probabilities, latency_ms, (model.folder / MODEL).stat().st_size)
            for model, evaluation, latency_ms in zip(models, evaluations, _latencies_ms(models), strict=True)
        ]
        evidence = Evidence(
            challenger=sides[0],
            opponent=sides[1] if opponent else None,
            labels=evaluations[0].labels,
            classes=challenger.metadata.classes,
            seed_accuracies=_seed_accuracies(self.tracker, challenger.run),
            opponent_name=opponent_name,
        )
        record = GateRecord(
            opponent=opponent_name,
            opponent_run=opponent.run if opponent else None,
            verdict=(verdict := decide(evidence, self.rules)),
            rules=self.rules,
            recipe_digest=challenger.metadata.recipe_digest,
            images=len(evidence.labels),
            correct={model.run: e.num_correct for model, e in zip(models, evaluations, strict=True)},
            onnx_sha256=_sha256(challenger.folder / MODEL),
            predictions_sha256={model.run: _sha256(self._path(model.run, split)) for model in models},
        )
        event = self.ledger.record(
            PASSED if verdict.passed else REFUSED,
            self.model,
            challenger.run,
            split=split,
            reason=forced or chosen,
            details=record.model_dump(mode="json"),
        )
        self.observer.decided(verdict, f"run {challenger.run}", f"the {opponent.name if opponent else CONSTANT}")
        artifact = f"gate/verdict-{event.id}.json"
        self.tracker.client.log_text(challenger.run, event.evidence.model_dump_json(indent=2), artifact)
        return event

    def _check_classes(self, challenger: EvaluatedModel, opponent: EvaluatedModel) -> None:
        mine, others = challenger.metadata.classes, opponent.metadata.classes
        if mine != others:
            raise UserError(
                self.model,
                f"the {opponent.name} knows other classes ({', '.join(others[:5])}, ...) than the challenger "
                f"({', '.join(mine[:5])}, ...)",
                "`--model` keeps another champion for them",
            )

    # ---------------------------------------------------------------------------------------------- what is evaluated

    def _export(self, model: EvaluatedModel, data: LocatedData | None = None) -> None:
        """Write the model as it would be served, if it isn't there, and compare it with torch, on its data where given."""
        path = model.folder / MODEL
        if path.exists():
            return
        classifier = Classifier.load(model.folder, torch.device("cpu"))
        export.export_onnx(classifier, path)
        if data:
            try:
                images = export.split_as_then(model.metadata, data.images).validation.images
            except DataError as error:
                self.observer.note(f"not compared with torch on the validation split, only on made-up images: {error}")
                return
            worst = export.check(classifier, path, images)
            on = f"the {len(images):,} images of the validation split"
            self.observer.note(export.difference_line(worst, on, classifier.image_size))
            if line := small_split_line(len(images), model.metadata.recipe.data.validation_fraction):
                self.observer.note(line)

    def onnx_of_verdict(self, challenger: EvaluatedModel, verdict: Event) -> Path:
        """The ONNX file that the verdict is about; Refused where exporting it once more doesn't give that."""
        self._export(challenger)
        path = challenger.folder / MODEL
        if _sha256(path) != verdict.evidence.record.onnx_sha256:
            raise PromotionRefused(
                f"run {challenger.run}",
                f"exported now, its ONNX model isn't the one that was evaluated {verdict.time}",
                "`--force` with `--reason` evaluates it as it is now",
            )
        return path

    def _evaluate(self, model: EvaluatedModel, data: LocatedData, split: str, reason: str) -> TestEvaluation:
        """On the test split: the stored predictions, else new ones. The ledger has the test evaluation first."""
        path = self._path(model.run, split)
        stored = self._is_stored(model.run, split)
        details = {
            "recipe_digest": model.metadata.recipe_digest,
            "source": "stored predictions" if stored else "images",
        }
        self.ledger.record(TEST_EVALUATION, self.model, model.run, split=split, reason=reason, details=details)
        if not stored:
            form, classes = model.metadata.recipe.data.form, model.metadata.classes
            images = test_split.open_test_split(data.dataset, form, data.data_dir, classes)
            session = export.session(model.folder / MODEL)
            probabilities = export.run_session(session, export.as_pixels(images.images))
            _write(path, TestEvaluation(images.labels.numpy(), probabilities))
        return _read(path)

    def _is_stored(self, run: str, split: str) -> bool:
        """Whether the file is one whose digest a verdict in the ledger names."""
        verdicts = [e for e in self.ledger.events() if e.kind in (PASSED, REFUSED) and e.split == split]
        path = self._path(run, split)
        if not path.is_file():
            return False
        return _sha256(path) in {event.evidence.record.predictions_sha256.get(run) for event in verdicts}

    def _path(self, run: str, split: str) -> Path:
        return self.ledger.home / TEST_EVALUATIONS / f"{run}-{split[:16]}.parquet"


# ---------------------------------------------------------------------------------------------- runs in MLflow


def control_of(tracker: MlflowTracker, run_id: str) -> str | None:
    """The control's run that the first champion has to beat; None outside a study, and for the control, whatever its seed.

    It is the finished trial that is called so, else trial 0. What finals trained is the best of several seeds, and meets
    the best of the control's: against a single one, luck alone won in up to 9 % with 5 seeds, 19 % with 10, not in 5 %
    (simulated). An infeasible control is none: it could not become champion either. UserError where the study has none.
    """
    run = tracker.client.get_run(run_id)
    study, tags = study_of(tracker, run), RunTags.of(run)
    if study is None:
        return None
    finished = _finished(tracker, study)
    trials = [other for other in finished if RunTags.of(other).role == "trial"]
    deleted = [other for other in queries.deleted_children(tracker, study.parent) if _is_finished_trial(other)]
    controls = control_runs(trials)
    ids = {control.info.run_id for control in controls or control_runs(deleted)}
    if ids & {run_id, tags.trial_run} or any(study.broken_by(control) for control in controls):
        return None
    if tags.role != "final" and controls:
        return controls[0].info.run_id
    finals = [other for other in finished if RunTags.of(other).trial_run in ids]
    # All of some finals have the epochs that `finals --epochs` says, which need not be the trials'.
    for length in (_epochs(run), *(_epochs(control) for control in controls[:1])):
        if alike := [other for other in finals if _epochs(other) == length]:
            return max(alike, key=lambda other: other.data.metrics[study.objective]).info.run_id
    if controls:
        return controls[0].info.run_id
    raise UserError(
        study.name,
        "has no finished control to compare with, and there is no champion",
        "`study NAME` resumes one that did not finish; where it was deleted in MLflow, restore it, or "
        f"`finals {study.name}` trains it anew",
    )


def _seed_accuracies(tracker: MlflowTracker, run_id: str) -> list[float]:
    """Validation accuracies of the finished runs of the study that differ from this one by their seed at most."""
    run = tracker.client.get_run(run_id)
    study = study_of(tracker, run)
    if study is None:
        return []
    by_seed = {
        other.data.params.get("training.seed"): other.data.metrics["val/accuracy"]
        for other in _finished(tracker, study)
        if _without_seed(other.data.params) == _without_seed(run.data.params) and "val/accuracy" in other.data.metrics
    }
    return list(by_seed.values())


def study_of(tracker: MlflowTracker, run: Run) -> StudyRuns | None:
    """The study that a run belongs to."""
    name, experiment = RunTags.of(run).study, run.info.experiment_id
    return next((s for s in queries.studies(tracker) if (s.name, s.experiment) == (name, experiment)), None)


def _without_seed(params: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in params.items() if name not in ("training.seed", "data.dataset")}


def _epochs(run: Run) -> str | None:
    return run.data.params.get("training.epochs")


def _finished(tracker: MlflowTracker, study: StudyRuns) -> list[Run]:
    """The oldest first."""
    return [run for run in queries.children(tracker, study) if RunTags.of(run).state is State.FINISHED]


def _is_finished_trial(run: Run) -> bool:
    tags = RunTags.of(run)
    return tags.role == "trial" and tags.state is State.FINISHED


# ------------------------------------------------------------------------------------------- stored predictions


def _write(path: Path, evaluation: TestEvaluation) -> None:
    """A row per image, in the split's order; whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {
        "label": pa.array(evaluation.labels, pa.int64()),
        "probabilities": pa.array(list(evaluation.probabilities), pa.list_(pa.float32())),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    pq.write_table(pa.table(rows), new)
    os.replace(new, path)


def _read(path: Path) -> TestEvaluation:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return TestEvaluation(table["label"].to_numpy(), np.array(table["probabilities"].to_pylist(), dtype=np.float32))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _latencies_ms(models: list[EvaluatedModel]) -> list[float]:
    """Milliseconds of one image, on this machine: the least of three medians, measured in turn."""
    rounds = [
        [export.latency_ms(model.folder / MODEL, model.metadata.recipe.data.image_size) for model in models]
        for _ in range(3)
    ]
    return [min(times) for times in zip(*rounds, strict=True)]
