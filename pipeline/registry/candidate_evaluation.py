"""One candidate evaluated: the models as they would be served, their predictions on the test split, the verdict."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import torch

from pipeline.disk import replacing, sha256_of
from pipeline.errors import DataError, PromotionRefused, UserError, counted, lines_of
from pipeline.evaluation.significance import small_split_line
from pipeline.inference.classifier import Classifier, ModelMetadata
from pipeline.registry import export, test_split
from pipeline.registry.card import share
from pipeline.registry.gate import ACCURACY, Evidence, GateRecord, ModelEvidence, Rules, Verdict, decide
from pipeline.registry.ledger import DELETED, PASSED, PROMOTED, REFUSED, TEST_EVALUATION, Champion, Event
from pipeline.registry.opponents import control_of, num_competing, seed_scores
from pipeline.registry.package import MODEL
from pipeline.registry.registered_model import CHAMPION, Registry
from pipeline.tracking import queries
from pipeline.tracking.models import find_model
from pipeline.tracking.run_data import LocatedData
from pipeline.tracking.tags import RunTags

TEST_EVALUATIONS = "test_evaluations"  # the folder of the predictions, beside the ledger
CONTROL, CONSTANT = "control", "constant answer"  # opponents where there is no champion
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


@dataclass(frozen=True)
class CandidateEvaluation:
    """Evaluates candidates for one registered model."""

    registry: Registry
    rules: Rules
    data_dir: Path
    folder: Path  # a temporary one
    observer: EvaluationObserver
    dataset: str | None = None  # where the challenger's data set lies; None: where it is known to have been

    def model(self, run: str, name: str, source: str | None = None) -> EvaluatedModel:
        """The model of a run, or of `source`, a registered version of it, as it is served; `name` is for messages.

        UserError where there is none, DataError where a version's files are not those that were registered.
        """
        folder = self.folder / run
        with find_model(self.registry.ledger.home, self.registry.tracker.uri, source or run) as model:
            shutil.copytree(model.folder, folder)
        return EvaluatedModel(run, name, Classifier.load(folder, torch.device("cpu")).metadata, folder)

    # ------------------------------------------------------------------------------------------------------- verdicts

    def verdict(self, challenger: EvaluatedModel, champion: Champion | None, forced: str, chosen: str) -> Event:
        """The challenger's verdict in the ledger: the former one where it still holds, else a new one.

        PromotionRefused where a former one doesn't hold, or says no, unless `forced` says why the run is evaluated again.
        `chosen` says why this run is the candidate, for the record. DataError where the challenger's data set is not what
        it was: what changed might have been among the images that it was trained on.
        """
        data = export.find_data_of(
            challenger.metadata, self.registry.tracker, self.data_dir, self.dataset, download=False
        )
        split = test_split.digest_of(data.about, data.data_dir, self.registry.ledger.home)
        opponent_run = champion.run if champion else control_of(self.registry.tracker, challenger.run)
        of_run = [event for event in self._verdicts(split) if event.run == challenger.run]
        for event in of_run:
            self._store(event)
        former = of_run[-1] if of_run else None
        if former and not forced:
            self._check_that_it_holds(former, opponent_run)
            self.observer.note(f"evaluated already, {former.time}: passed; the test split is not opened again")
            return former
        if champion:
            uri = f"models:/{self.registry.model}/{champion.version}"
            opponent = self.model(champion.run, f"champion, version {champion.version}", uri)
        elif opponent_run:
            opponent = self.model(opponent_run, CONTROL)
        else:
            opponent = None
            self.observer.note(
                "no champion yet and no control to compare with: the first champion must be better than a constant answer"
            )
        return self._new_verdict(challenger, opponent, data, split, forced, chosen)

    def _verdicts(self, split: str) -> list[Event]:
        """All verdicts on this test split, the oldest first."""
        return [
            event for event in self.registry.ledger.events() if event.kind in (PASSED, REFUSED) and event.split == split
        ]

    def _store(self, verdict: Event) -> None:
        """Among the artifacts of its run, if it isn't there: the ledger has it first, and a kill may have come between."""
        tracker, artifact = self.registry.tracker, f"gate/verdict-{verdict.id}.json"
        if queries.read_file(tracker, verdict.run, artifact) is None:
            tracker.client.log_text(verdict.run, verdict.evidence.model_dump_json(indent=2), artifact)

    def _num_on_other_splits(self, run: str, split: str) -> int:
        """Verdicts on other test splits, about runs whose data set lay where this run's did."""
        tracker = self.registry.tracker
        places = set(queries.data_places(tracker, run))
        others = [e.run for e in self.registry.ledger.events() if e.kind in (PASSED, REFUSED) and e.split != split]
        here = {other for other in set(others) if places.intersection(queries.data_places(tracker, other))}
        return sum(other in here for other in others)

    def _check_that_it_holds(self, former: Event, opponent_run: str | None) -> None:
        """PromotionRefused where it doesn't, and by the way out: evaluate again, roll back, or nothing."""
        subject, record = f"run {former.run}", former.evidence.record
        passed = f"was evaluated on this test split by {former.user}, {former.time}, and passed"
        if former.kind == REFUSED:
            as_other = "" if former.model == self.registry.model else f", to become {former.model}"
            rule = f"was evaluated on this test split by {former.user}, {former.time}, and refused{as_other}"
            raise PromotionRefused(subject, rule, _EVALUATE_AGAIN, lines_of(record.verdict.problems))
        if former.model != self.registry.model:
            raise PromotionRefused(subject, f"{passed}, to become {former.model}", _EVALUATE_AGAIN)
        later = [e for e in self.registry.ledger.events(former.model) if e.run == former.run and e.id > former.id]
        if promoted := [event for event in later if event.kind == PROMOTED]:
            version = promoted[-1].version
            served = f"{passed}, and served as {former.model} version {version}"
            if any((event.kind, event.version) == (DELETED, version) for event in later):
                raise PromotionRefused(subject, f"{served}, which was deleted in MLflow", _EVALUATE_AGAIN)
            command = self.registry.command(f"rollback --version {version}")
            remedy = f"`{command}` with a `--reason` makes it champion without"
            raise PromotionRefused(subject, f"{served}, which is champion no more", _EVALUATE_AGAIN, [remedy])
        if record.rules != self.rules:
            then, now = record.rules.model_dump(), self.rules.model_dump()
            changed = ", ".join(
                f"{name} {then[name]:g} then, {now[name]:g} now" for name in now if then[name] != now[name]
            )
            raise PromotionRefused(subject, f"{passed} by other rules ({changed})", _EVALUATE_AGAIN)
        if record.opponent_run != opponent_run:
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
        predictions = [self._evaluate(m, data, split, reason) for m, reason in zip(models, reasons, strict=False)]
        labels = predictions[0]["label"].to_numpy()
        if not np.array_equal(labels, predictions[-1]["label"]):
            folder = self.registry.ledger.home / TEST_EVALUATIONS
            raise DataError(str(folder), "the labels of two models differ", "remove the folder")
        study = queries.study_of(self.registry.tracker, self.registry.tracker.client.get_run(challenger.run))
        objective = study.objective if study else ACCURACY
        latencies_ms = export.latencies_ms(
            [(model.folder / MODEL, model.metadata.recipe.data.image_size) for model in models]
        )
        sides = [
            ModelEvidence(np.stack(table["probabilities"].to_list()), latency_ms, (model.folder / MODEL).stat().st_size)
            for model, table, latency_ms in zip(models, predictions, latencies_ms, strict=True)
        ]
        evidence = Evidence(
            challenger=sides[0],
            opponent=sides[1] if opponent else None,
            labels=labels,
            classes=challenger.metadata.classes,
            seed_scores=seed_scores(self.registry.tracker, challenger.run, objective),
            opponent_name=(CONTROL if opponent.name == CONTROL else CHAMPION) if opponent else CONSTANT,
            objective=objective,
            competing=num_competing(self.registry.tracker, challenger.run, opponent.run if opponent else None),
        )
        caution = self._caution(opponent, data) if opponent else ""
        return self._record(models, evidence, split, forced or chosen, caution)

    def _record(
        self, models: Sequence[EvaluatedModel], evidence: Evidence, split: str, reason: str, caution: str
    ) -> Event:
        """Decide, and keep the verdict in the ledger and among the artifacts of the challenger's run.

        `models` are those of the evidence: the challenger, and its opponent where there is one.
        """
        challenger, *opponents = models
        verdict = decide(evidence, self.rules)
        sides = filter(None, (evidence.challenger, evidence.opponent))
        num_correct = [int((side.probabilities.argmax(1) == evidence.labels).sum()) for side in sides]
        record = GateRecord(
            opponent=evidence.opponent_name,
            opponent_run=opponents[0].run if opponents else None,
            verdict=verdict,
            rules=self.rules,
            recipe_digest=challenger.metadata.recipe_digest,
            objective=evidence.objective,
            scores=dict(zip((model.run for model in models), evidence.scores, strict=True)),
            comparison=len(self._verdicts(split)) + 1,
            caution=caution,
            images=len(evidence.labels),
            correct=dict(zip((model.run for model in models), num_correct, strict=True)),
            onnx_sha256=sha256_of(challenger.folder / MODEL),
            predictions_sha256={model.run: sha256_of(self._path(model.run, split)) for model in models},
        )
        kind, details = PASSED if verdict.passed else REFUSED, record.model_dump(mode="json")
        event = self.registry.ledger.record(
            kind, self.registry.model, challenger.run, split=split, reason=reason, details=details
        )
        opponent = opponents[0].name if opponents else CONSTANT
        self.observer.decided(verdict, f"run {challenger.run}", f"the {opponent}{record.terms}")
        names = ["the challenger", *(f"the {model.name}" for model in opponents)]
        rates = [f"{name} {share(number, record.images)}" for name, number in zip(names, num_correct, strict=True)]
        self.observer.note(f"accuracy on the {record.images:,} images of the test split: {', '.join(rates)}")
        if caution:
            self.observer.note(f"caution: {caution}")
        if record.comparison > 1:
            chance = 1 - (1 - self.rules.alpha) ** record.comparison
            self.observer.note(
                f"comparison number {record.comparison} on this test split: alpha = {self.rules.alpha:g} is the chance "
                f"that one passes a model which isn't better; that any of {record.comparison} does, up to "
                f"{100 * chance:.0f} %"
            )
        if earlier := self._num_on_other_splits(challenger.run, split):
            self.observer.note(
                f"{counted(earlier, 'earlier comparison')} on other test splits of this data set's place, which may have "
                "images in common with this one: not in this number"
            )
        self._store(event)
        return event

    def _caution(self, opponent: EvaluatedModel, data: LocatedData) -> str:
        """That the opponent was trained on other images, and how many of the test split are among them; else empty.

        Equal data sets have the same test images, and so do two of which the same images are sealed.
        """
        tracker, listed = self.registry.tracker, data.images.listed
        run = tracker.store.run(opponent.run)
        sealed = RunTags.of(run).test_digest if run else None
        if opponent.metadata.data_digest == data.images.digest or (
            sealed and listed and sealed == listed.listing.test_digest
        ):
            return ""
        try:
            its = export.find_data_of(opponent.metadata, tracker, self.data_dir, None, download=False).images.listed
        except UserError:
            its = None  # not where it was
        seen = "whether it has seen images of this test split can't be told"
        if listed and its:
            shared, count = test_split.num_shared(data.about, tracker.home, its.listing.usable.files)
            flatters = ", which flatters it" if shared else ""
            seen = f"{shared:,} of the {count:,} images of this test split are among those{flatters}"
        whose = opponent.name.partition(",")[0]
        return f"the {whose} was trained and validated on images of another data set, or of another version: {seen}"

    def _check_classes(self, challenger: EvaluatedModel, opponent: EvaluatedModel) -> None:
        mine, others = challenger.metadata.classes, opponent.metadata.classes
        if mine != others:
            sides = ("the challenger", mine, others), (f"the {opponent.name}", others, mine)
            own = [(who, [name for name in ours if name not in theirs]) for who, ours, theirs in sides]
            details = [
                f"only {who} knows {', '.join(names[:5])}{', ...' * (len(names) > 5)}" for who, names in own if names
            ]
            raise UserError(
                self.registry.model,
                f"the {opponent.name} knows other classes than the challenger",
                "`--model` keeps another champion for them",
                details or ["the same ones, in another order"],
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
                then = export.split_as_then(model.metadata, data.images)
            except DataError as error:
                self.observer.note(f"not compared with torch on the validation split, only on made-up images: {error}")
                return
            images = then.validation.images
            worst = export.check(classifier, path, images)
            on = f"the {len(images):,} images of the validation split"
            self.observer.note(export.difference_line(worst, on, classifier.image_size))
            if line := small_split_line(len(images), then.drawn_fraction):
                self.observer.note(line)

    def onnx_of_verdict(self, challenger: EvaluatedModel, verdict: Event) -> Path:
        """The ONNX file that the verdict is about; PromotionRefused where exporting it once more doesn't give that."""
        self._export(challenger)
        path = challenger.folder / MODEL
        if sha256_of(path) != verdict.evidence.record.onnx_sha256:
            raise PromotionRefused(
                f"run {challenger.run}",
                f"exported now, its ONNX model isn't the one that was evaluated {verdict.time}",
                "`--force` with `--reason` evaluates it as it is now",
            )
        return path

    def _evaluate(self, model: EvaluatedModel, data: LocatedData, split: str, reason: str) -> pd.DataFrame:
        """A model's predictions on the test split, stored or new: `label` int64, `probabilities` float32 (C,), by image.

        The ledger has the test evaluation first.
        """
        path = self._path(model.run, split)
        stored = self._is_stored(model, split)
        details = {
            "recipe_digest": model.metadata.recipe_digest,
            "source": "stored predictions" if stored else "images",
        }
        self.registry.ledger.record(
            TEST_EVALUATION, self.registry.model, model.run, split=split, reason=reason, details=details
        )
        if not stored:
            form, classes = model.metadata.recipe.data.form, model.metadata.classes
            parts = test_split.read_test_split(data.about, form, data.data_dir, classes, self.registry.ledger.home)
            session = export.session(model.folder / MODEL)
            predicted = [(part.labels.numpy(), export.predict(session, part.images)) for part in parts]
            labels, probabilities = (np.concatenate(arrays) for arrays in zip(*predicted, strict=True))
            table = pd.DataFrame({"label": labels, "probabilities": list(probabilities)})
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as new:
                table.to_parquet(new, index=False)
        return pd.read_parquet(path)

    def _is_stored(self, model: EvaluatedModel, split: str) -> bool:
        """Whether its predictions are there, and are those of a verdict in the ledger, by their digest.

        Where a verdict was about this model, they are those of the ONNX file that it was about.
        """
        path = self._path(model.run, split)
        if not path.is_file():
            return False
        events, digest = self._verdicts(split), sha256_of(path)
        named = [event for event in events if event.evidence.record.predictions_sha256.get(model.run) == digest]
        files = {event.evidence.record.onnx_sha256 for event in named if event.run == model.run}
        return bool(named) and (not files or sha256_of(model.folder / MODEL) in files)

    def _path(self, run: str, split: str) -> Path:
        return self.registry.ledger.home / TEST_EVALUATIONS / f"{run}-{split[:16]}.parquet"
