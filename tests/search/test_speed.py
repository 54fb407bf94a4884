"""What a recipe's training takes, measured on the real loop."""

import contextlib
import time
from typing import Any

import pytest
import torch

from pipeline.data.prepare import TrainingData, prepare
from pipeline.recipe import Recipe
from pipeline.search import speed as speed_module
from pipeline.search.speed import (
    Overhead,
    RecipeFails,
    Speed,
    Stopwatch,
    few_images,
    measure,
    measure_mean,
    measure_overhead,
    trial_seconds,
)
from pipeline.sections.data import Data
from pipeline.tracking.tracker import NullTracker
from pipeline.training import progressive
from pipeline.training.loop import PARTS, Diverged, train

CPU = torch.device("cpu")
STEP = ("data", "augmentation", "forward", "backward", "optimizer")


def test_training_reports_its_parts_in_order(small_recipe: Recipe, digits: TrainingData) -> None:
    parts: list[str] = []
    part = few_images(digits, 2 * 64, 20)
    train(small_recipe.changed({"training.epochs": 2}), part, CPU, on_part=parts.append)
    step = [*STEP, "tracking"]
    assert parts == ["data", *(2 * [*step[1:], "data"] + ["evaluation", "tracking", "data"]) * 2]
    assert set(parts) == set(PARTS)


def test_measuring_changes_no_weight(small_recipe: Recipe, digits: TrainingData) -> None:
    alone, heard = train(small_recipe, digits, CPU), train(small_recipe, digits, CPU, on_part=Stopwatch(CPU))
    assert torch.equal(alone.validation_logits, heard.validation_logits)


def test_stopwatch_gives_each_part_its_time() -> None:
    watch = Stopwatch(CPU)
    watch("data")
    time.sleep(0.01)
    watch.restart()
    for part, seconds in (("forward", 0.02), ("backward", 0.04), ("forward", 0.02), ("tracking", 0)):
        watch(part)
        time.sleep(seconds)
    total, steps = watch.seconds()
    assert steps == 2
    assert total["forward"] >= 0.04 and total["backward"] >= 0.04
    assert total["data"] < 0.01, "what was before the restart is forgotten"
    assert total["tracking"] == 0, "the last mark has no end"
    assert set(total) == set(PARTS)


def test_measurement_counts_the_steps_of_the_complete_data(small_recipe: Recipe, digits: TrainingData) -> None:
    seen: list[int] = []
    began = time.perf_counter()
    speed = measure(small_recipe, digits, CPU, 0, lambda epoch, step, steps: seen.append(step))
    took = time.perf_counter() - began
    assert seen == [1, 2, 3, 4] * 2, "one short epoch to warm up, one that counts"
    assert (speed.batch_size, speed.steps) == (64, len(digits.train.images) // 64)
    assert set(speed.step_s) == set(STEP) and all(seconds > 0 for seconds in speed.step_s.values())
    assert 4 * sum(speed.step_s.values()) + speed.evaluation_s < took
    assert speed.images_per_second == pytest.approx(64 / sum(speed.step_s.values()))
    assert speed.epoch_s == pytest.approx(speed.steps * sum(speed.step_s.values()) + speed.evaluation_s)
    long = measure(small_recipe, digits, CPU, 1.5, lambda epoch, step, steps: seen.append(step))
    assert len(seen) > 16 and long.steps == speed.steps


def test_recipe_that_would_diverge_is_measured(small_recipe: Recipe, digits: TrainingData) -> None:
    wild = {"optimizer.lr": 99, "optimizer.weight_decay": 9, "training.clip_norm": 0}
    assert measure(small_recipe.changed(wild), digits, CPU, 0.2).images_per_second > 0
    wild = {"optimizer.name": "muon", "optimizer.head_lr": 1e6, "optimizer.bias_lr": 1e6, "optimizer.weight_decay": 1}
    assert measure(small_recipe.changed(wild), digits, CPU, 0.2).images_per_second > 0


def test_epochs_of_the_head_alone_count_by_their_share(
    small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, measured = [], []

    def watched_train(recipe: Recipe, *arguments: Any) -> Any:
        trained.append(recipe.transfer.frozen_epochs >= recipe.training.epochs)
        return train(recipe, *arguments)

    def watched_measure(*arguments: Any) -> Speed:
        measured.append(measure(*arguments))
        return measured[-1]

    monkeypatch.setattr(speed_module, "train", watched_train)
    monkeypatch.setattr(speed_module, "measure", watched_measure)
    for frozen_epochs, head_only in ((0, [False]), (1, [False, True]), (4, [True])):
        recipe = small_recipe.changed({"training.epochs": 4, "transfer.frozen_epochs": frozen_epochs})
        trained.clear(), measured.clear()
        mean = measure_mean(recipe, digits, CPU, 0)
        assert trained == head_only
        first, last = measured[0].step_s["backward"], measured[-1].step_s["backward"]
        assert mean.step_s["backward"] == pytest.approx((3 * first + last) / 4)


def test_measurement_ends_where_on_step_raises(small_recipe: Recipe, digits: TrainingData) -> None:
    def stop(epoch: int, step: int, steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(small_recipe, digits, CPU, 60, stop)


def test_trial_is_its_steps_evaluations_and_tracking(small_recipe: Recipe, digits: TrainingData) -> None:
    speed = Speed(64, 20, dict.fromkeys(STEP, 0.01), evaluation_s=0.5, memory_gib=1.0)
    recipe = small_recipe.changed({"training.epochs": 3, "augmentation.horizontal_flip": 0.5})
    seconds = trial_seconds(recipe, speed, Overhead(trial_s=2.0, epoch_s=0.1))
    assert set(seconds) == set(PARTS)
    assert seconds["forward"] == pytest.approx(3 * 20 * 0.01)
    assert seconds["evaluation"] == pytest.approx(0.5 * (3 + 3)), "after each epoch, mirrored, and shifted both ways"
    assert seconds["tracking"] == pytest.approx(2.0 + 3 * 0.1)
    unmoved = recipe.changed({"augmentation.horizontal_flip": 0, "augmentation.crop_padding": 0})
    assert trial_seconds(unmoved, speed, Overhead(0, 0))["evaluation"] == pytest.approx(0.5 * 3)


def test_overhead_of_a_trial_is_its_start_and_end(small_recipe: Recipe, digits: TrainingData) -> None:
    class Slow(NullTracker):
        @contextlib.contextmanager
        def run(self, *words, **more):
            time.sleep(0.2)
            with super().run(*words, **more) as tracked:
                tracked.log_metrics = lambda metrics, step: time.sleep(0.05)
                yield tracked

    speed = measure(small_recipe, digits, CPU, 0)
    overhead = measure_overhead(small_recipe, digits, CPU, speed, Slow())
    assert overhead.epoch_s >= 0.05
    assert overhead.trial_s >= 0.25, "the start, and the end with its last numbers"


def test_few_images_are_evenly_spaced(digits: TrainingData) -> None:
    part = few_images(digits, 100, 50)
    assert len(part.train.images) == len(part.train.labels) == 100
    assert len(part.validation_ids) == len(part.validation.labels) == 50
    stride = len(digits.train.images) // 100
    assert torch.equal(part.train.images[7], digits.train.images[7 * stride])
    whole = few_images(digits, 10_000, 10_000)
    assert torch.equal(whole.train.images, digits.train.images)
    assert torch.equal(whole.validation.labels, digits.validation.labels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_stopwatch_never_waits_for_a_gpu(small_recipe: Recipe, digits: TrainingData, tmp_path) -> None:
    """torch raises at any synchronising call inside an epoch's steps; the device's times add up to the host's."""
    from pipeline.data.datasets import load

    gpu = torch.device("cuda")
    data = prepare(load(Data(dataset="digits", image_size=8), tmp_path), small_recipe.data, gpu)
    train(small_recipe, data, gpu)  # warm: libraries synchronise when they start
    watch = Stopwatch(gpu)

    def on_step(epoch: int, step: int, steps: int) -> None:
        torch.cuda.set_sync_debug_mode("default" if step == steps else "error")

    began = time.perf_counter()
    try:
        train(small_recipe, data, gpu, on_step=on_step, on_part=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    total, steps = watch.seconds()
    assert steps == 2 * (len(data.train.images) // 64)
    assert sum(total.values()) == pytest.approx(time.perf_counter() - began, rel=0.2)


def test_growing_images_are_measured_at_their_mean_size(
    small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    real = progressive.at_size
    monkeypatch.setattr(progressive, "at_size", lambda images, size: seen.add(size) or real(images, size))
    measure(small_recipe.changed({"curriculum.start_size": 4, "training.epochs": 10}), digits, CPU, 0)
    assert seen == {6}


def test_recipe_whose_trial_would_fail_is_named(
    small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    error: Exception = torch.OutOfMemoryError("CUDA out of memory.\nmore")

    def measure(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(speed_module, "measure", measure)
    what = "attention with batches of 64 and images of 8 pixels"
    with pytest.raises(
        RecipeFails, match=rf"^{what}: out of memory: CUDA out of memory\.; smaller ones take less memory$"
    ):
        measure_mean(small_recipe, digits, CPU, 0)
    error = Diverged("the loss is nan")
    with pytest.raises(RecipeFails, match=rf"^{what}: diverged: the loss is nan$"):
        measure_mean(small_recipe, digits, CPU, 0)
    error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        measure_mean(small_recipe, digits, CPU, 0)
