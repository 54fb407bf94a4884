"""One recipe trained, scored and tracked: what stays behind can be read without us."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
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
from pipeline.data.datasets import Listed
from pipeline.data.listing import Listing
from pipeline.data.prepare import TrainingData
from pipeline.evaluation.calibration import fit_temperature
from pipeline.evaluation.logits import predict_logits
from pipeline.evaluation.scores import score
from pipeline.experiment import ExperimentRequest, Interrupted, Outcome, Prune, _write_predictions
from pipeline.inference.classifier import ModelMetadata
from pipeline.inference.methods import METHODS, out_of_fold
from pipeline.models.build import build_network
from pipeline.recipe import Recipe, parse_recipe
from pipeline.tracking.journal import FOLDER, RECORDS
from pipeline.tracking.tracker import MlflowTracker, NullTracker, OwnershipLost, State
from pipeline.training import loop
from pipeline.training.checkpoints import load_weights, read_checkpoint
from pipeline.training.loop import EpochReport
from pipeline.training.resume import Resume

CPU = torch.device("cpu")


class FolderTracker:
    """A tracker that writes into a folder and keeps metrics in a list."""

    def __init__(self, folder: Path):
        self.folder, self.key, self.id = folder, "key", "run"
        self.points: list[tuple[str, int, float]] = []
        self.ended: list[tuple[State, str]] = []

    @contextmanager
    def run(self, *arguments: Any, **options: Any) -> Iterator["FolderTracker"]:
        yield self

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.points += [(name, step, value) for name, value in metrics.items()]

    def log_files(self, folder: Path) -> None:
        for file in folder.iterdir():
            (self.folder / file.name).write_bytes(file.read_bytes())

    def end(self, state: State, reason: str = "") -> None:
        self.ended.append((state, reason))


Train = Callable[..., Outcome]


@pytest.fixture(scope="module")
def run_small(small_recipe: Recipe, digits: TrainingData) -> Train:
    """Runs the small recipe on digits; `changes` are fields of the request."""

    def run(tracker: Any, **changes: Any) -> Outcome:
        fields = {"recipe": small_recipe, "data": digits, "device": CPU, "name": "one"}
        return experiment.run(ExperimentRequest(**fields | changes), tracker)

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, run_small: Train) -> tuple[FolderTracker, Outcome]:
    tracker = FolderTracker(tmp_path_factory.mktemp("run"))
    return tracker, run_small(tracker)


def test_every_number_of_a_run_is_logged_once(
    finished: tuple[FolderTracker, Outcome], digits: TrainingData, small_recipe: Recipe
) -> None:
    tracker, outcome = finished
    assert tracker.ended == [(State.FINISHED, "")]
    assert outcome.state is State.FINISHED
    places = [(name, step) for name, step, _ in tracker.points]
    assert len(set(places)) == len(places)
    by_epoch = {name for name, step in places if step == 1}
    assert by_epoch >= {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "val/f1_macro", "optimizer/lr"}
    assert by_epoch >= {"val/balanced_accuracy", *(f"val/f1/{name}" for name in digits.classes)}
    at_the_end = {name for name, step in places if step == 2}
    per_class = {f"val/{score}/{name}" for score in ("precision", "recall") for name in digits.classes}
    methods = {f"methods/{score}_{method}" for score in ("accuracy", "f1_macro") for method in METHODS}
    calibration = {"calibration/temperature", "calibration/ece", "calibration/loss"}
    others = {"val/ece", "model/parameters", "model/latency_ms", "time/training_s"}
    assert at_the_end - by_epoch == per_class | methods | calibration | others
    assert outcome.metrics.keys() == at_the_end
    counted = sum(p.numel() for p in build_network(small_recipe.model, 10, digits.image_size, seed=0).parameters())
    assert outcome.metrics["model/parameters"] == counted


def test_images_in_files_leave_the_same_files_bit_for_bit(
    finished: tuple[FolderTracker, Outcome],
    run_small: Train,
    digits: TrainingData,
    from_files: Callable[[TrainingData], TrainingData],
    tmp_path: Path,
) -> None:
    tracker = FolderTracker(tmp_path)
    run_small(tracker, data=from_files(digits))
    for name in ("weights.safetensors", "predictions.parquet", "prediction_methods.csv", "most_confident_wrong.png"):
        assert (tracker.folder / name).read_bytes() == (finished[0].folder / name).read_bytes(), name


def test_predictions_give_the_scores(finished: tuple[FolderTracker, Outcome], digits: TrainingData) -> None:
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


def test_predictions_of_images_in_files_name_them_and_their_groups(digits: TrainingData, tmp_path: Path) -> None:
    count = int(digits.validation_ids.max()) + 3
    splits = np.array(["train"] * (count - 1) + ["test"])
    names, groups = [f"\udce9/{n}.png" for n in range(count)], np.array([f"g{n}" for n in range(count)])
    listing = Listing(tmp_path, digits.classes, names, np.zeros(count, np.int64), splits, groups)
    labels = digits.validation.labels.numpy()
    for of_files, columns in ((listing, ["image", "group"]), (replace(listing, groups=None), ["image"])):
        data = replace(digits, listed=Listed(of_files, None))
        _write_predictions(tmp_path / "a.parquet", data, labels, np.full((len(labels), 10), 0.1, np.float32))
        frame = pq.read_table(tmp_path / "a.parquet").to_pandas()
        assert list(frame)[5:] == columns
        assert list(frame.image) == [f"\\xe9/{n}.png" for n in frame.id]
    _write_predictions(
        tmp_path / "a.parquet", replace(digits, listed=Listed(listing, None)), labels, np.eye(10)[labels]
    )
    assert pq.read_table(tmp_path / "a.parquet")["group"].to_pylist() == [f"g{n}" for n in digits.validation_ids]


def test_methods_are_measured_on_the_stored_predictions(finished: tuple[FolderTracker, Outcome]) -> None:
    tracker, outcome = finished
    frame = pq.read_table(tracker.folder / "predictions.parquet").to_pandas()
    probabilities, labels = np.stack(frame.probabilities).astype(np.float64), frame.label.to_numpy()
    metadata = ModelMetadata.model_validate(read_checkpoint(tracker.folder))
    assert metadata.calibration.temperature == outcome.metrics["calibration/temperature"]
    assert metadata.calibration.temperature == pytest.approx(fit_temperature(np.log(probabilities), labels), rel=1e-3)
    plain = score(out_of_fold(np.log(probabilities)[None], labels)["plain"], labels)
    assert outcome.metrics["calibration/ece"] == pytest.approx(plain.ece, rel=0.01)
    assert outcome.metrics["calibration/loss"] == pytest.approx(plain.loss, rel=0.01)
    assert outcome.metrics["methods/accuracy_plain"] == pytest.approx(outcome.metrics["val/accuracy"])
    assert outcome.metrics["methods/accuracy_tta"] != outcome.metrics["methods/accuracy_plain"]
    table = pd.read_csv(tracker.folder / "prediction_methods.csv", dtype={"class": str})
    assert list(table["class"]) == ["all", "all", *metadata.classes]
    assert table["adaptive"][0] == pytest.approx(metadata.measured["adaptive"].accuracy, abs=1e-4)


def test_weights_give_the_predictions(
    finished: tuple[FolderTracker, Outcome], small_recipe: Recipe, digits: TrainingData
) -> None:
    tracker, _ = finished
    checkpoint = json.loads((tracker.folder / "checkpoint.json").read_text())
    for name in ("weights.safetensors", "weights_plain.safetensors"):
        digest = hashlib.sha256((tracker.folder / name).read_bytes()).hexdigest()
        assert digest in json.dumps(checkpoint)
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


def test_figures_and_table_are_artifacts(finished: tuple[FolderTracker, Outcome], digits: TrainingData) -> None:
    tracker, outcome = finished
    figures = sorted(file.stem for file in tracker.folder.glob("*.png"))
    assert figures == [
        "confusion_matrix",
        "learning_curves",
        "most_confident_correct",
        "most_confident_wrong",
        "reliability",
    ]
    for file in tracker.folder.glob("*.png"):
        with Image.open(file) as image:
            assert image.width >= 600
            assert np.asarray(image.convert("L")).std() > 5, "not blank"
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
def test_exceptions_become_states(
    error: BaseException, state: State, reason: str, tmp_path: Path, run_small: Train
) -> None:
    def fail(report: EpochReport) -> None:
        raise error

    tracker = FolderTracker(tmp_path)
    outcome = run_small(tracker, on_epoch=fail)
    assert (outcome.state, outcome.reason) == (state, reason)
    assert tracker.ended == [(state, reason)]
    assert outcome.epochs == 1
    assert {"val/accuracy", "val/f1/7"} <= outcome.metrics.keys()
    assert [step for name, step, _ in tracker.points if name == "val/f1/7"] == [1]


def test_short_training_measures_the_latency_that_is_bounded(tmp_path: Path, run_small: Train) -> None:
    """Else a search would train recipes in full that can't win."""
    tracker, bounds = FolderTracker(tmp_path), {"model/latency_ms": 1e-6}
    outcome = run_small(tracker, constraints=bounds, pruned_at_end="a short trial")
    assert (outcome.state, outcome.reason) == (State.PRUNED, "a short trial")
    points = [(step, value) for name, step, value in tracker.points if name == "model/latency_ms"]
    assert points == [(2, outcome.metrics["model/latency_ms"])] and points[0][1] > 0


@pytest.mark.parametrize(("error", "state"), [(None, State.FINISHED), (Prune("poor"), State.PRUNED)])
def test_of_many_classes_f1_is_logged_at_the_end_only(
    error: Exception | None, state: State, tmp_path: Path, run_small: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_epoch(report: EpochReport) -> None:
        assert "val/f1/7" not in report.metrics, "a heartbeat would carry them"
        if error and report.epoch == 2:
            raise error

    monkeypatch.setattr(experiment, "MAX_CLASSES_BY_EPOCH", 9)
    tracker = FolderTracker(tmp_path)
    outcome = run_small(tracker, on_epoch=on_epoch)
    assert outcome.state is state
    points = [(step, value) for name, step, value in tracker.points if name == "val/f1/7"]
    assert points == [(2, outcome.metrics["val/f1/7"])]


def test_capture_ended_by_memory_is_out_of_memory(run_small: Train) -> None:
    """torch.cuda.graph ends its capture all the same, and what that raises comes last."""

    def fail(report: EpochReport) -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    outcome = run_small(NullTracker(), on_epoch=fail)
    assert outcome.state is State.FAILED
    assert outcome.reason.startswith("out of memory: operation failed due to a previous error")


def test_bug_is_raised(tmp_path: Path, run_small: Train) -> None:
    def bug(report: EpochReport) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_small(NullTracker(), on_epoch=bug)


def test_without_averaging_there_is_one_set_of_weights(tmp_path: Path, run_small: Train, small_recipe: Recipe) -> None:
    run_small(FolderTracker(tmp_path), recipe=small_recipe.changed({"training.ema_decay": 0}))
    assert (tmp_path / "weights.safetensors").exists()
    assert not (tmp_path / "weights_plain.safetensors").exists()


@pytest.fixture
def save_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training's state is saved at the end of every epoch."""
    monkeypatch.setattr(experiment, "Resume", partial(Resume, every_s=0))


def test_a_stop_is_seen_after_the_step_and_the_epoch_that_are_under_way(tmp_path: Path, run_small: Train) -> None:
    done: list[tuple[int, ...]] = []
    steps = {"on_step": lambda *step: done.append(step), "stop_requested": lambda: len(done) == 2}
    outcome = run_small(FolderTracker(tmp_path), stop_reason="enough", **steps)
    assert (outcome.state, outcome.reason, outcome.epochs, len(done)) == (State.INTERRUPTED, "enough", 0, 2)
    epochs: list[EpochReport] = []
    hooks = {"on_epoch": epochs.append, "on_step": lambda *step: done.append(step)}
    outcome = run_small(FolderTracker(tmp_path), stop_requested=lambda: bool(epochs), **hooks)
    assert done[-1][0] == 1, "no step of the next epoch"
    assert (outcome.state, outcome.reason, outcome.epochs) == (State.INTERRUPTED, "stopped by the user", 1)


def test_a_stop_after_the_last_epoch_loses_nothing(tmp_path: Path, run_small: Train) -> None:
    epochs: list[EpochReport] = []
    outcome = run_small(FolderTracker(tmp_path), on_epoch=epochs.append, stop_requested=lambda: len(epochs) == 2)
    assert (outcome.state, outcome.epochs, len(epochs)) == (State.FINISHED, 2, 2)


@pytest.mark.usefixtures("save_every_epoch")
def test_interrupted_run_resumes_and_counts_former_epochs(
    finished: tuple[FolderTracker, Outcome], tmp_path: Path, run_small: Train
) -> None:
    folder, tracker = tmp_path / "state", FolderTracker(tmp_path)
    steps: list[int] = []

    def on_step(epoch: int, step: int, total: int) -> None:
        steps.append(step)
        if len(steps) == total + 2:
            raise Interrupted

    first = run_small(tracker, on_step=on_step, resume_dir=folder)
    assert (first.state, first.epochs, first.notes) == (State.INTERRUPTED, 1, ())
    assert folder.is_dir()
    starts: list[tuple[int, ...]] = []

    def stop(*at: int) -> None:
        starts.append(at[:2])
        raise Interrupted

    again = run_small(tracker, on_step=stop, resume_dir=folder)
    assert starts == [(2, 1)], "the epoch under way"
    assert (again.state, again.epochs) == (State.INTERRUPTED, 1)
    assert again.metrics == first.metrics
    assert again.seconds > first.metrics["time/epoch_s"]
    last = run_small(tracker, resume_dir=folder)
    assert (last.state, last.epochs) == (State.FINISHED, 2)
    assert last.notes == ("resumes after epoch 1 of 2",)
    assert last.seconds > first.metrics["time/epoch_s"] + last.metrics["time/epoch_s"]
    assert not folder.exists()
    uninterrupted, outcome = finished
    assert last.metrics["val/loss"] == outcome.metrics["val/loss"]
    assert last.metrics["time/training_s"] > first.metrics["time/epoch_s"] + last.metrics["time/epoch_s"]
    for name in ("weights.safetensors", "weights_plain.safetensors"):
        assert (tracker.folder / name).read_bytes() == (uninterrupted.folder / name).read_bytes()


@pytest.mark.usefixtures("save_every_epoch")
@pytest.mark.parametrize(
    ("error", "stays"),
    [(Prune("poor"), False), (MemoryError(), False), (Interrupted(), True), (RuntimeError("a bug"), True)],
)
def test_kept_state_is_removed_unless_it_may_be_resumed(
    error: Exception, stays: bool, tmp_path: Path, run_small: Train
) -> None:
    def fail(report: EpochReport) -> None:
        if report.epoch == 2:
            assert folder.is_dir()
            raise error

    folder = tmp_path / "state"
    with pytest.raises(RuntimeError) if isinstance(error, RuntimeError) else nullcontext():
        run_small(NullTracker(), on_epoch=fail, resume_dir=folder)
    assert folder.exists() == stays


@pytest.mark.usefixtures("save_every_epoch")
@pytest.mark.parametrize("short", [False, True])
def test_the_scores_of_a_run_are_of_the_model_that_it_keeps(
    short: bool, tmp_path: Path, run_small: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after its last epoch, which is trained again, and not to the same bits: as on a GPU."""

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    fields = {
        "run_key": "a" * 32,
        "resume_dir": tmp_path / "state",
        "constraints": {"model/latency_ms": 1e9},
        "pruned_at_end": "a short trial" if short else "",
    }
    tracker = MlflowTracker(tmp_path / "mlruns")
    with monkeypatch.context() as patched:
        patched.setattr(experiment, "_known_after" if short else "publish", interrupt)
        first = run_small(tracker, **fields)
    assert (first.state, first.epochs) == (State.INTERRUPTED, 2)
    seed_of = loop._seed_of
    monkeypatch.setattr(loop, "_seed_of", lambda seed, epoch, use: seed_of(seed + 1, epoch, use))
    last = run_small(tracker, **fields)
    assert last.metrics["val/loss"] != first.metrics["val/loss"]
    run = tracker.client.get_run(tracker.id_of(last.run_key))
    assert {name: run.data.metrics[name] for name in last.metrics} == last.metrics
    steps = [point.step for point in tracker.client.get_metric_history(run.info.run_id, "val/loss")]
    assert steps == [1, 2]


def test_lost_run_is_left_as_it_is(tmp_path: Path, run_small: Train, small_recipe: Recipe) -> None:
    """Another process has the trial since the first epoch: nothing more is logged, and the run is not ended."""
    reports: list[int] = []

    def check_ownership() -> None:
        if reports:
            raise OwnershipLost

    tracker, key = MlflowTracker(tmp_path / "mlruns"), "a" * 32
    with pytest.raises(OwnershipLost):
        run_small(
            tracker,
            recipe=small_recipe.changed({"training.epochs": 3}),
            run_key=key,
            on_epoch=lambda report: reports.append(report.epoch),
            check_ownership=check_ownership,
        )
    records = (tmp_path / "mlruns" / FOLDER / key / RECORDS).read_text()
    assert '"val/accuracy"' in records and '"end"' not in records
    assert reports == [1]
