"""One recipe trained, scored and tracked: what stays behind can be read without us."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score

from pipeline import experiment
from pipeline.data.prepare import TrainingData
from pipeline.evaluation.logits import predict_logits
from pipeline.evaluation.scores import score
from pipeline.experiment import Interrupted, Outcome, Prune
from pipeline.inference.classifier import ModelMetadata
from pipeline.inference.methods import METHODS, fit_temperature, out_of_fold
from pipeline.models.build import build_network
from pipeline.recipe import Recipe, parse_recipe
from pipeline.tracking.tracker import NullTracker, State
from pipeline.training.checkpoints import load_weights, read_checkpoint
from pipeline.training.loop import EpochReport
from pipeline.training.resume import Resume

CPU = torch.device("cpu")


class Folder:
    """A tracker that writes into a folder and keeps numbers in a list."""

    def __init__(self, folder: Path):
        self.folder, self.key, self.id = folder, "key", "run"
        self.points: list[tuple[str, int, float]] = []
        self.ended: list[tuple[State, str]] = []

    @contextmanager
    def run(self, *arguments: Any, **named: Any) -> Iterator["Folder"]:
        yield self

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.points += [(name, step, value) for name, value in metrics.items()]

    def log_files(self, folder: Path) -> None:
        for file in folder.iterdir():
            (self.folder / file.name).write_bytes(file.read_bytes())

    def end(self, state: State, reason: str = "") -> None:
        self.ended.append((state, reason))


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, small_recipe: Recipe, digits: TrainingData
) -> tuple[Folder, Outcome]:
    tracker = Folder(tmp_path_factory.mktemp("run"))
    return tracker, experiment.run(small_recipe, digits, CPU, tracker, "one")


def test_every_number_of_a_run_is_logged_once(
    finished: tuple[Folder, Outcome], digits: TrainingData, small_recipe: Recipe
) -> None:
    tracker, outcome = finished
    assert tracker.ended == [(State.FINISHED, "")]
    assert outcome.state is State.FINISHED
    places = [(name, step) for name, step, _ in tracker.points]
    assert len(set(places)) == len(places)
    by_epoch = {name for name, step in places if step == 1}
    assert by_epoch >= {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "val/f1_macro", "optimizer/lr"}
    at_the_end = {name for name, step in places if step == 2}
    per_class = {f"val/{score}/{name}" for score in ("f1", "precision", "recall") for name in digits.classes}
    methods = {f"methods/{score}_{method}" for score in ("accuracy", "f1_macro") for method in METHODS}
    calibration = {"calibration/temperature", "calibration/ece", "calibration/loss"}
    others = {"val/ece", "model/parameters", "model/latency_ms", "time/training_s"}
    assert at_the_end - by_epoch == per_class | methods | calibration | others
    assert outcome.metrics.keys() == at_the_end
    counted = sum(p.numel() for p in build_network(small_recipe.model, 10, digits.image_size, seed=0).parameters())
    assert outcome.metrics["model/parameters"] == counted


def test_the_predictions_give_the_scores_back(finished: tuple[Folder, Outcome], digits: TrainingData) -> None:
    tracker, outcome = finished
    table = pq.read_table(tracker.folder / "predictions.parquet")
    assert json.loads(table.schema.metadata[b"classes"]) == list(digits.classes)
    frame = table.to_pandas()
    probabilities = np.stack(frame.probabilities)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    assert list(frame.id) == digits.validation_ids.tolist()
    assert list(frame.label) == digits.validation.labels.tolist()
    assert (frame.label == frame.predicted).mean() == pytest.approx(outcome.metrics["val/accuracy"])
    macro = f1_score(frame.label, probabilities.argmax(1), average="macro")
    assert macro == pytest.approx(outcome.metrics["val/f1_macro"])


def test_methods_and_calibration_are_measured_on_the_stored_predictions(finished: tuple[Folder, Outcome]) -> None:
    tracker, outcome = finished
    frame = pq.read_table(tracker.folder / "predictions.parquet").to_pandas()
    probabilities, labels = np.stack(frame.probabilities).astype(np.float64), frame.label.to_numpy()
    facts = ModelMetadata.model_validate(read_checkpoint(tracker.folder))
    assert facts.fitted.temperature == outcome.metrics["calibration/temperature"]
    assert facts.fitted.temperature == pytest.approx(fit_temperature(np.log(probabilities), labels), rel=1e-3)
    judged = score(out_of_fold(np.log(probabilities)[None], labels)["plain"], labels)
    assert outcome.metrics["calibration/ece"] == pytest.approx(judged.ece, rel=0.01)
    assert outcome.metrics["calibration/loss"] == pytest.approx(judged.loss, rel=0.01)
    assert outcome.metrics["methods/accuracy_plain"] == pytest.approx(outcome.metrics["val/accuracy"])
    assert outcome.metrics["methods/accuracy_tta"] != outcome.metrics["methods/accuracy_plain"]
    table = pd.read_csv(tracker.folder / "prediction_methods.csv", dtype={"class": str})
    assert list(table["class"]) == ["all", "all", *facts.classes]
    assert table["adaptive"][0] == pytest.approx(facts.measured["adaptive"].accuracy, abs=1e-4)


def test_the_weights_give_the_predictions_back(
    finished: tuple[Folder, Outcome], small_recipe: Recipe, digits: TrainingData
) -> None:
    tracker, _ = finished
    facts = json.loads((tracker.folder / "checkpoint.json").read_text())
    for name in ("weights.safetensors", "weights_plain.safetensors"):
        digest = hashlib.sha256((tracker.folder / name).read_bytes()).hexdigest()
        assert digest in json.dumps(facts)
    kept = read_checkpoint(tracker.folder)
    assert parse_recipe(kept["recipe"]) == small_recipe
    assert kept["recipe_digest"] == small_recipe.digest()
    network = build_network(small_recipe.model, len(kept["classes"]), digits.image_size, seed=99)
    load_weights(tracker.folder / "weights.safetensors", network)
    mean, std = torch.tensor(kept["mean"]), torch.tensor(kept["std"])
    logits = predict_logits(network, digits.validation.images, mean, std, small_recipe.training.precision)
    stored = np.stack(pq.read_table(tracker.folder / "predictions.parquet").to_pandas().probabilities)
    np.testing.assert_allclose(logits.softmax(1).numpy(), stored, atol=0.02)  # bf16 in channels_last or not
    assert (logits.argmax(1).numpy() == stored.argmax(1)).mean() > 0.97


def test_the_pictures_and_the_table_are_there(finished: tuple[Folder, Outcome], digits: TrainingData) -> None:
    tracker, outcome = finished
    pictures = sorted(file.stem for file in tracker.folder.glob("*.png"))
    assert pictures == [
        "confusion_matrix",
        "learning_curves",
        "most_confident_correct",
        "most_confident_wrong",
        "reliability",
    ]
    for file in tracker.folder.glob("*.png"):
        with Image.open(file) as picture:
            assert picture.width >= 600
            assert np.asarray(picture.convert("L")).std() > 5, "not blank"
    table = pd.read_csv(tracker.folder / "per_class.csv", dtype={"class": str})
    assert list(table["class"]) == list(digits.classes)
    assert table.support.sum() == len(digits.validation.labels)
    assert table.f1[3] == pytest.approx(outcome.metrics[f"val/f1/{digits.classes[3]}"])


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (Prune("below the median"), State.PRUNED, "below the median"),
        (MemoryError("no more"), State.FAILED, "out of memory: no more"),
        (torch.OutOfMemoryError("CUDA out of memory"), State.FAILED, "out of memory: CUDA out of memory"),
        (Interrupted(), State.INTERRUPTED, "stopped by the user"),
        (KeyboardInterrupt(), State.INTERRUPTED, "stopped by the user"),
    ],
)
def test_exceptions_become_states_here(
    error: BaseException, state: State, reason: str, tmp_path: Path, small_recipe: Recipe, digits: TrainingData
) -> None:
    def fail(report: EpochReport) -> None:
        raise error

    tracker = Folder(tmp_path)
    outcome = experiment.run(small_recipe, digits, CPU, tracker, "one", on_epoch=fail)
    assert (outcome.state, outcome.reason) == (state, reason)
    assert tracker.ended == [(state, reason)]
    assert outcome.epochs == 1
    assert "val/accuracy" in outcome.metrics


def test_a_capture_that_memory_ends_is_out_of_memory(small_recipe: Recipe, digits: TrainingData) -> None:
    """torch.cuda.graph ends its capture all the same, and what that raises comes last."""

    def fail(report: EpochReport) -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    outcome = experiment.run(small_recipe, digits, CPU, NullTracker(), "one", on_epoch=fail)
    assert outcome.state is State.FAILED
    assert outcome.reason.startswith("out of memory: operation failed due to a previous error")


def test_a_bug_is_not_a_state(tmp_path: Path, small_recipe: Recipe, digits: TrainingData) -> None:
    def bug(report: EpochReport) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        experiment.run(small_recipe, digits, CPU, NullTracker(), "one", on_epoch=bug)


def test_without_averaging_there_is_one_set_of_weights(
    tmp_path: Path, small_recipe: Recipe, digits: TrainingData
) -> None:
    experiment.run(small_recipe.changed({"training.ema_decay": 0}), digits, CPU, Folder(tmp_path), "one")
    assert (tmp_path / "weights.safetensors").exists()
    assert not (tmp_path / "weights_plain.safetensors").exists()


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """States are saved at every epoch's end."""
    monkeypatch.setattr(experiment, "Resume", partial(Resume, every_s=0))


@pytest.mark.usefixtures("always")
def test_an_interrupted_run_goes_on_from_its_state_and_counts_what_came_before(
    finished: tuple[Folder, Outcome], tmp_path: Path, small_recipe: Recipe, digits: TrainingData
) -> None:
    folder, tracker = tmp_path / "state", Folder(tmp_path)
    steps: list[int] = []

    def on_step(epoch: int, step: int, total: int) -> None:
        steps.append(step)
        if len(steps) == total + 2:
            raise Interrupted

    first = experiment.run(small_recipe, digits, CPU, tracker, "one", on_step=on_step, resume=folder)
    assert (first.state, first.epochs, first.notes) == (State.INTERRUPTED, 1, ())
    assert folder.is_dir()
    begun: list[tuple[int, ...]] = []

    def stop(*at: int) -> None:
        begun.append(at[:2])
        raise Interrupted

    again = experiment.run(small_recipe, digits, CPU, tracker, "one", on_step=stop, resume=folder)
    assert begun == [(2, 1)], "the epoch under way"
    assert (again.state, again.epochs) == (State.INTERRUPTED, 1)
    assert again.metrics == first.metrics
    assert again.seconds > first.metrics["time/epoch_s"]
    last = experiment.run(small_recipe, digits, CPU, tracker, "one", resume=folder)
    assert (last.state, last.epochs) == (State.FINISHED, 2)
    assert last.notes == ("resumes after epoch 1 of 2",)
    assert last.seconds > first.metrics["time/epoch_s"] + last.metrics["time/epoch_s"]
    assert not folder.exists()
    whole, outcome = finished
    assert last.metrics["val/loss"] == outcome.metrics["val/loss"]
    assert last.metrics["time/training_s"] > first.metrics["time/epoch_s"] + last.metrics["time/epoch_s"]
    for name in ("weights.safetensors", "weights_plain.safetensors"):
        assert (tracker.folder / name).read_bytes() == (whole.folder / name).read_bytes()


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("error", "stays"),
    [(Prune("poor"), False), (MemoryError(), False), (Interrupted(), True), (RuntimeError("a bug"), True)],
)
def test_the_state_goes_with_the_run_unless_it_may_be_gone_on_with(
    error: Exception, stays: bool, tmp_path: Path, small_recipe: Recipe, digits: TrainingData
) -> None:
    def fail(report: EpochReport) -> None:
        if report.epoch == 2:
            assert folder.is_dir()
            raise error

    folder = tmp_path / "state"
    with pytest.raises(RuntimeError) if isinstance(error, RuntimeError) else nullcontext():
        experiment.run(small_recipe, digits, CPU, NullTracker(), "one", on_epoch=fail, resume=folder)
    assert folder.exists() == stays
