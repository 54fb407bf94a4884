"""Candidates evaluated in a real MLflow store: the opponent, the verdict, the stored predictions."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import balanced_accuracy_score

from pipeline.cli.exit_codes import exit_code
from pipeline.data.prepare import TrainingData
from pipeline.disk import sha256_of
from pipeline.errors import PromotionRefused, UserError
from pipeline.recipe import Recipe
from pipeline.registry import candidate_evaluation
from pipeline.registry import test_split as opener
from pipeline.registry.candidate_evaluation import TEST_EVALUATIONS, CandidateEvaluation, control_of
from pipeline.registry.ledger import PASSED, REFUSED, TEST_EVALUATION, Ledger
from pipeline.registry.promote import promote
from pipeline.registry.registered_model import Registry
from pipeline.sections.data import Data
from pipeline.tracking import queries
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker, RunRequest
from registry.helpers import DATA, RULES, RecordingObserver, Store, kinds, record

pytestmark = pytest.mark.usefixtures("one_export_a_model")


def test_model_that_is_not_better_is_refused_once(store: Store, tmp_path: Path) -> None:
    registry, view = store.registry(tmp_path, "worse"), RecordingObserver()
    promote(registry, store.best, RULES, DATA, view)
    before = len(registry.ledger.events())
    with pytest.raises(PromotionRefused) as caught:
        promote(registry, store.good, RULES, DATA, view)
    assert exit_code(caught.value) == 5
    assert [line.split(":")[0] for line in caught.value.lines[:3]] == ["better", "gain", "beyond seeds"]
    assert kinds(registry)[before:] == [TEST_EVALUATION, TEST_EVALUATION, REFUSED]
    assert registry.alias("champion") == "1"
    assert registry.tracker.client.list_artifacts(store.good, "gate")
    with pytest.raises(
        PromotionRefused, match=r"was evaluated on this test split by .*, and refused; `--force`"
    ) as caught:
        promote(registry, store.good, RULES, DATA, view)
    assert caught.value.lines[1].startswith("  better: p = ")
    with pytest.raises(PromotionRefused, match=r"^better"):
        promote(registry, store.good, RULES, DATA, view, forced="to be sure")
    last = registry.ledger.events()[-1]
    assert (last.kind, last.reason) == (REFUSED, "to be sure")


def test_control_as_first_champion_must_beat_constant_answer(store: Store, tmp_path: Path) -> None:
    registry, view = store.registry(tmp_path, "control"), RecordingObserver()
    with pytest.raises(PromotionRefused, match=r"^better: .* only the constant answer"):
        promote(registry, store.control, RULES, DATA, view)
    assert "must be better than a constant answer" in view.lines[0]


def test_promotion_judges_by_the_objective_of_the_study(store: Store, tmp_path: Path) -> None:
    registry, view = store.registry(tmp_path, "balanced"), RecordingObserver()
    client = registry.tracker.client
    [study] = queries.studies(registry.tracker)
    client.set_tag(study.parent, "objective", "val/balanced_accuracy")
    try:
        promote(registry, store.good, RULES, DATA, view)
    finally:
        client.set_tag(study.parent, "objective", "val/accuracy")
    record = next(event for event in registry.ledger.events() if event.kind == PASSED).evidence.record
    assert "points of balanced accuracy" in record.verdict.results[1].number
    tables = [pd.read_parquet(path) for path in sorted((tmp_path / TEST_EVALUATIONS).iterdir())]
    expected = {balanced_accuracy_score(t["label"], np.stack(t["probabilities"]).argmax(1)) for t in tables}
    assert sorted(record.scores.values()) == pytest.approx(sorted(expected)) and store.good in record.scores
    version = client.get_model_version("balanced", "1")
    assert f"balanced accuracy, the study's objective: {record.scores[store.good]:.1%} against" in version.description


def test_other_onnx_than_was_evaluated_is_not_registered(store: Store, tmp_path: Path) -> None:
    registry, view = store.registry(tmp_path, "other-bytes"), RecordingObserver()
    evaluation = candidate_evaluation.CandidateEvaluation(registry, RULES, DATA, tmp_path / "files", view)
    challenger = evaluation.model(store.best, "challenger")
    split, details = opener.digest_of(Data(dataset="digits"), DATA), record(onnx_sha256="0" * 64)
    verdict = registry.ledger.record(PASSED, registry.model, store.best, split=split, details=details)
    with pytest.raises(PromotionRefused, match="exported now, its ONNX model isn't the one that was evaluated"):
        evaluation.onnx_of_verdict(challenger, verdict)


def test_predictions_of_another_onnx_file_are_not_used(store: Store, tmp_path: Path) -> None:
    registry = store.registry(tmp_path, "other-file")
    evaluation = candidate_evaluation.CandidateEvaluation(
        registry, RULES, DATA, tmp_path / "files", RecordingObserver()
    )
    model, split = evaluation.model(store.best, "challenger"), "0" * 64
    evaluation._export(model)
    path = evaluation._path(store.best, split)
    path.parent.mkdir()
    path.write_bytes(b"predictions")
    for onnx_sha256, is_used in (("0" * 64, False), (sha256_of(model.folder / "model.onnx"), True)):
        details = record(onnx_sha256=onnx_sha256, predictions_sha256={store.best: sha256_of(path)})
        registry.ledger.record(PASSED, registry.model, store.best, split=split, details=details)
        assert evaluation._is_stored(model, split) is is_used


@pytest.mark.parametrize(
    ("classes", "lines"),
    [("ab", ["only the challenger knows c"]), ("abd", ["only the challenger knows c", "only the champion knows d"]),
     ("acb", ["the same ones, in another order"])],
)  # fmt: skip
def test_other_classes_are_named(classes: str, lines: list[str], tmp_path: Path) -> None:
    def model(name: str, classes: str) -> Any:
        return SimpleNamespace(name=name, metadata=SimpleNamespace(classes=tuple(classes)))

    registry = Registry(cast(MlflowTracker, None), Ledger(tmp_path), "other")
    evaluation = CandidateEvaluation(registry, RULES, DATA, tmp_path, RecordingObserver())
    with pytest.raises(UserError, match=r"^other: the champion knows other classes than the challenger; ") as caught:
        evaluation._check_classes(model("challenger", "abc"), model("champion", classes))
    assert [line.strip() for line in caught.value.lines[1:]] == lines


def test_pass_by_other_rules_does_not_hold(store: Store, tmp_path: Path) -> None:
    registry, view = store.registry(tmp_path, "rules"), RecordingObserver()
    split, details = opener.digest_of(Data(dataset="digits"), DATA), record(opponent_run=store.control)
    registry.ledger.record(PASSED, registry.model, store.best, split=split, details=details)
    with pytest.raises(PromotionRefused, match=r"and passed by other rules \(alpha 0.05 then, 0.01 now\); `--force`"):
        promote(registry, store.best, RULES.changed(["alpha=0.01"]), DATA, view)


def test_first_champion_is_compared_with_a_control_alike(
    tmp_path: Path, small_recipe: Recipe, digits: TrainingData
) -> None:
    """A trial meets the control's trial; the best of several seeds, in finals, the best of the control's seeds."""
    tracker = MlflowTracker(tmp_path / "mlruns")
    parent = tracker.open_study("fair-v1-digits", "?", "val/accuracy", [])

    def made(name: str, score: float, epochs: int = 2, folds: int = 0, **tags: str) -> str:
        tags |= {"study": "fair-v1-digits"}
        recipe = small_recipe.changed({"training.epochs": epochs, "data.folds": folds})
        with tracker.run(
            RunRequest(name=name, recipe=recipe, data=digits, parent_run=parent.id, tags=RunTags.parse(tags))
        ) as run:
            run.log_metrics({"val/accuracy": score}, 1)
            run.end(State.FINISHED)
        return tracker.id_of(run.key)

    control = made("trial 0 (control)", 0.5, role="trial", trial="0")
    trial = made("trial 1", 0.9, 1, role="trial", trial="1")
    alone = made("final of trial 1, seed 1", 0.9, 1, role="final", trial="1", trial_run=trial)
    assert control_of(tracker, trial) == control and control_of(tracker, control) is None
    assert control_of(tracker, alone) == control, "where the control has no finals"
    lucky = [made(f"seed {n}", score, role="final", trial="0", trial_run=control) for n, score in enumerate((0.6, 0.4))]
    longer = made("seed 1", 0.8, 7, role="final", trial="0", trial_run=control)
    rival = made("seed 1", 0.9, 7, role="final", trial="1", trial_run=trial)
    assert control_of(tracker, alone) == lucky[0] and control_of(tracker, rival) == longer, "of finals as long"
    on_fold = made("fold 0", 0.95, folds=5, role="final", trial="0", trial_run=control)
    of_folds = made("fold 0", 0.9, folds=5, role="final", trial="1", trial_run=trial)
    assert control_of(tracker, alone) == lucky[0] and control_of(tracker, of_folds) == on_fold, "of the same images"
    mean = made("mean of 2 runs", 0.9, 1, role="ensemble", method="mean", members="{}")
    assert control_of(tracker, mean) == lucky[0], "it is made of finals"
    assert control_of(tracker, trial) == control, "one seed against one"
    assert [control_of(tracker, run) for run in (*lucky, longer, on_fold)] == [None] * 4, (
        "the control, whatever its seed"
    )
    tracker.client.set_tag(parent.id, "constraints", '{"val/accuracy": 0.4}')
    assert control_of(tracker, trial) is None, "an infeasible control"


def test_a_run_from_before_a_field_is_a_seed_of_the_same_recipe(
    tmp_path: Path, small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = MlflowTracker(tmp_path / "mlruns")
    parent, flat, ids = tracker.open_study("old-v1-digits", "?", "val/accuracy", []), Recipe.flat, list[str]()
    for seed, score, added in ((1, 0.5, True), (2, 0.6, False)):
        recipe = small_recipe.changed({"training.seed": seed})
        if not added:
            kept = {name: value for name, value in flat(recipe).items() if name != "loss.teacher"}
            monkeypatch.setattr(Recipe, "flat", lambda self, kept=kept: kept)
        tags = RunTags.parse({"study": "old-v1-digits", "role": "final", "trial": "1"})
        with tracker.run(
            RunRequest(name=f"seed {seed}", recipe=recipe, data=digits, parent_run=parent.id, tags=tags)
        ) as run:
            run.log_metrics({"val/accuracy": score}, 1)
            run.end(State.FINISHED)
        ids.append(tracker.id_of(run.key))
    assert sorted(candidate_evaluation._seed_scores(tracker, ids[0], "val/accuracy")) == [0.5, 0.6]


def test_tampered_predictions_are_not_used(store: Store, tmp_path: Path) -> None:
    registry = store.registry(tmp_path, "tampered")
    promote(registry, store.good, RULES, DATA, RecordingObserver())
    (kept,) = (tmp_path / TEST_EVALUATIONS).glob(f"{store.good}-*")
    pq.write_table(pq.read_table(kept).slice(0, 100), kept)
    promote(registry, store.best, RULES, DATA, RecordingObserver())
    assert [e.details["source"] for e in registry.ledger.events() if e.kind == TEST_EVALUATION][-2:] == [
        "images",
        "images",
    ]
