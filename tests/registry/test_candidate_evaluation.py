"""Candidates evaluated in a real MLflow store: the opponent, the verdict, the stored predictions."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score

from pipeline.cli.exit_codes import exit_code
from pipeline.data.datasets import listed, load
from pipeline.data.prepare import prepare
from pipeline.disk import sha256_of
from pipeline.errors import PromotionRefused, UserError
from pipeline.inference.classifier import ModelMetadata
from pipeline.recipe import Recipe
from pipeline.registry import candidate_evaluation
from pipeline.registry import test_split as opener
from pipeline.registry.candidate_evaluation import TEST_EVALUATIONS, CandidateEvaluation, EvaluatedModel
from pipeline.registry.ledger import PASSED, REFUSED, TEST_EVALUATION, Ledger, VerdictEvidence
from pipeline.registry.promote import promote
from pipeline.registry.registered_model import Registry
from pipeline.sections.data import Data
from pipeline.tracking import queries
from pipeline.tracking.run_data import LocatedData
from pipeline.tracking.tags import State
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
    [stored] = store.home.glob(f"**/{store.good}/artifacts/gate/verdict-{registry.ledger.events()[-1].id}.json")
    stored.unlink()  # as where a kill came before it was written
    with pytest.raises(
        PromotionRefused, match=r"was evaluated on this test split by .*, and refused; `--force`"
    ) as caught:
        promote(registry, store.good, RULES, DATA, view)
    assert caught.value.lines[1].startswith("  better: p = ")
    assert VerdictEvidence.model_validate_json(stored.read_text()) == registry.ledger.events()[-1].evidence
    with pytest.raises(PromotionRefused, match=r"and refused, to become worse; `--force`"):
        promote(Registry(registry.tracker, registry.ledger, "worse-too"), store.good, RULES, DATA, view)
    with pytest.raises(PromotionRefused, match=r"^better"):
        promote(registry, store.good, RULES, DATA, view, forced="to be sure")
    last = registry.ledger.events()[-1]
    assert (last.kind, last.reason) == (REFUSED, "to be sure")
    assert last.evidence.record.comparison == 3, "a model that is evaluated again has a second chance, too"


def test_control_as_first_champion_must_beat_constant_answer(store: Store, tmp_path: Path) -> None:
    registry, view = store.registry(tmp_path, "control"), RecordingObserver()
    with pytest.raises(PromotionRefused, match=r"^better: .* only the constant answer"):
        promote(registry, store.control, RULES, DATA, view)
    assert "must be better than a constant answer" in view.lines[0]


def test_promotion_judges_by_the_objective_of_the_study(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caution = "the control was trained on other images"
    monkeypatch.setattr(CandidateEvaluation, "_caution", lambda *_: caution)
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
    assert record.verdict.results[2].reason.endswith("; the best of 3 trials, so alpha is 0.017")
    tables = [pd.read_parquet(path) for path in sorted((tmp_path / TEST_EVALUATIONS).iterdir())]
    expected = {balanced_accuracy_score(t["label"], np.stack(t["probabilities"]).argmax(1)) for t in tables}
    assert sorted(record.scores.values()) == pytest.approx(sorted(expected)) and store.good in record.scores
    version = client.get_model_version("balanced", "1")
    assert f"balanced accuracy, the study's objective: {record.scores[store.good]:.1%} against" in version.description
    assert record.caution == caution and f"caution: {caution}" in view.lines
    assert f"\n\nCaution: {caution}.\n\n| rule" in version.description


def grey_folder(root: Path, greys: Sequence[int]) -> Path:
    """Two classes; an image's grey says which it is."""
    for name, brighter in (("cat", 0), ("dog", 100)):
        (root / name).mkdir(parents=True)
        for grey in greys:
            Image.new("RGB", (8, 8), (grey + brighter,) * 3).save(root / name / f"{grey}.png")
    return root


def test_opponent_that_has_seen_test_images_is_named(small_recipe: Recipe, tmp_path: Path) -> None:
    """A second version of a folder at another place has a seal of its own; a folder that only grew keeps its seal."""
    home = tmp_path / "mlruns"
    registry = Registry(MlflowTracker(home), Ledger(home), "versions")
    evaluation = CandidateEvaluation(registry, RULES, DATA, tmp_path / "files", RecordingObserver())

    def run_on(root: Path) -> tuple[EvaluatedModel, LocatedData]:
        """A run that was trained on a folder, and the folder."""
        changes = {"data.dataset": str(root), "data.test_fraction": 0.4, "data.validation_fraction": 0.3}
        about = small_recipe.changed(changes)
        listed(about.data, home).fix(home)
        images = load(about.data, DATA, home)
        data = prepare(images, about.data, torch.device("cpu"))
        with registry.tracker.run(RunRequest(name="x", recipe=about, data=data)) as run:
            run.end(State.FINISHED)
        id = registry.tracker.id_of(run.key)
        metadata = SimpleNamespace(run_id=id, recipe=about, data_digest=images.digest)
        model = EvaluatedModel(id, "champion, version 1", cast(ModelMetadata, metadata), tmp_path)
        return model, LocatedData(images, about.data, DATA)

    first, first_data = run_on(grey_folder(tmp_path / "v1", range(10)))
    second, second_data = run_on(grey_folder(tmp_path / "v2", range(20)))
    usable = {Path(file).read_bytes() for file in listed(first_data.about, home).listing.usable.files}
    test = [Path(file).read_bytes() for file in listed(second_data.about, home).listing.sealed_part.files]
    seen = sum(file in usable for file in test)
    assert seen and evaluation._caution(first, second_data) == (
        "the champion was trained and validated on images of another data set, or of another version: "
        f"{seen} of the {len(test)} images of this test split are among those, which flatters it"
    )
    assert evaluation._caution(second, second_data) == ""
    grey_folder(tmp_path / "more", range(20, 22))
    for file in (tmp_path / "more").rglob("*.png"):
        file.rename(tmp_path / "v1" / file.relative_to(tmp_path / "more"))
    later, grown = run_on(tmp_path / "v1")
    assert grown.images.digest != first_data.images.digest and evaluation._caution(first, grown) == ""
    registry.ledger.record(REFUSED, "versions", first.run, split="before it grew", details=record())
    counts = [
        evaluation._num_on_other_splits(run, split)
        for run, split in ((later.run, "now"), (later.run, "before it grew"), (second.run, "now"))
    ]
    assert counts == [1, 0, 0], "of other images at this place"
    assert evaluation._caution(first, second_data).endswith("images of this test split can't be told"), "it is gone"


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
