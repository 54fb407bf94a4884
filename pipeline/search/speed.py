"""How fast a recipe trains on this machine, measured with the real loop; what one trial of it takes, part by part."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline.data.datasets import Split
from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.evaluation.logits import autocast
from pipeline.experiment import DIVERGED, publish, split_metrics, why_failed
from pipeline.inference.methods import views_of
from pipeline.models.build import build_network
from pipeline.recipe import Recipe
from pipeline.tracking.tags import State
from pipeline.tracking.tracker import RunRequest, Tracker
from pipeline.training.execution import now, seconds_between
from pipeline.training.loop import PARTS, Diverged, EpochReport, train
from pipeline.training.progressive import mean_size

# Measured epochs are short, so that slow networks are measured too; a GPU must not run out of steps that are queued.
_STEPS = {"cpu": 4, "cuda": 64}
_VALIDATION = {"cpu": 250, "cuda": 5000}
_MANY_EPOCHS = 10_000
PROBE_IMAGES = 8  # of a step that is measured by itself
CONTROL_S = 1.5  # of measuring a control; on slow networks two short epochs take longer
# What is not measured each time: tracking would leave a run behind. On 2 CPU cores MLflow took 0.05 to 0.1 s a trial
# besides the epochs' metrics, and a worker's start 6.0 s of processor time, until its first trial of digits.
TRACKING_S = 0.1
WORKER_START_S = 6.0


class Stopwatch:
    """Seconds that each part took: the device's on a GPU, by CUDA events, so that nothing waits; else the host's.

    Call it with a part's name where the part begins, as `training.loop.train` does.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def __call__(self, part: str) -> None:
        """From here on the time belongs to `part`."""
        self._marks.append((part, now(self._device)))

    def restart(self) -> None:
        """Forget the time so far."""
        self._marks = [(self._marks[-1][0], now(self._device))]

    def seconds(self) -> tuple[dict[str, float], int]:
        """Part -> seconds in all, and the number of training steps; waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        total = dict.fromkeys(PARTS, 0.0)
        for (part, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            total[part] += seconds_between(start, end)
        return total, sum(part == "forward" for part, _ in self._marks)


def fastest_precision(recipe: Recipe, num_classes: int) -> str:
    """bf16 or fp32: with which of them a step of this network takes less processor time here.

    Depthwise convolutions of photos' size are slower in bf16, others are faster (pipeline/models/README.md).
    """
    size, seconds = recipe.data.image_size, {}
    network = build_network(recipe.model, num_classes, size, seed=0)
    network.to(memory_format=torch.channels_last)
    images = torch.zeros(PROBE_IMAGES, 3, size, size).contiguous(memory_format=torch.channels_last)
    for precision in ("bf16", "fp32"):
        for _ in range(2):  # the first one warms up
            start = time.process_time()
            with autocast(images.device, precision):
                logits = network(images)
            logits.float().logsumexp(1).sum().backward()
            seconds[precision] = time.process_time() - start
    return min(seconds, key=lambda precision: seconds[precision])


@dataclass(frozen=True)
class Speed:
    """One recipe's speed on one data set."""

    batch_size: int
    steps: int  # of an epoch of the complete training split
    step_s: dict[str, float]  # seconds of a step, by part
    evaluation_s: float  # of the complete validation split, once
    memory_gib: float  # most in use: on a GPU of the training, on a CPU of the process

    @property
    def images_per_second(self) -> float:
        """Training images, augmentation included, evaluation not."""
        return self.batch_size / sum(self.step_s.values())

    @property
    def epoch_s(self) -> float:
        """Seconds of an epoch, evaluation included."""
        return self.steps * sum(self.step_s.values()) + self.evaluation_s


@dataclass(frozen=True)
class Overhead:
    """What a trial takes besides its training and the evaluations, in seconds."""

    trial_s: float  # the run's start and end, scores, figures, files
    epoch_s: float  # an epoch's metrics


class RecipeFails(UserError):
    """A recipe whose trial would fail: it needs too much memory, or diverges."""


class _Measured(Exception):
    """Ends a training that was measured for long enough."""


def measure_mean(
    recipe: Recipe,
    data: TrainingData,
    device: torch.device,
    seconds: float,
    on_step: Callable[[int, int, int], None] = lambda epoch, step, steps: None,
) -> Speed:
    """`measure`, of the mean of a recipe's epochs: those in which only the head learns are cheaper than the others.

    RecipeFails where a trial of the recipe would.
    """
    share = min(1.0, recipe.transfer.frozen_epochs / recipe.training.epochs)
    parts = [(part, head_only) for part, head_only in ((1 - share, False), (share, True)) if part]
    try:
        speeds = [
            (part, measure(recipe, data, device, part * seconds, on_step, head_only)) for part, head_only in parts
        ]
    except (Diverged, MemoryError, RuntimeError) as error:
        if not (reason := why_failed(error)):
            raise
        failure = _recipe_fails(recipe, reason)
    else:
        first = speeds[0][1]
        return replace(
            first,
            step_s={name: sum(part * speed.step_s[name] for part, speed in speeds) for name in first.step_s},
            evaluation_s=sum(part * speed.evaluation_s for part, speed in speeds),
            memory_gib=max(speed.memory_gib for _, speed in speeds),
        )
    if device.type == "cuda":
        torch.cuda.empty_cache()  # out here: the error no longer holds the network
    raise failure


def _recipe_fails(recipe: Recipe, reason: str) -> RecipeFails:
    size = f"batches of {recipe.training.batch_size} and images of {recipe.data.image_size} pixels"
    remedy = "" if reason.startswith(DIVERGED) else "smaller ones take less memory"
    return RecipeFails(f"{recipe.model.network} with {size}", reason.splitlines()[0], remedy)


def measure(
    recipe: Recipe,
    data: TrainingData,
    device: torch.device,
    seconds: float,
    on_step: Callable[[int, int, int], None] = lambda epoch, step, steps: None,
    head_only: bool = False,
) -> Speed:
    """Train for `seconds`, and at least two short epochs, of which the first warms up and isn't counted.

    All layers learn that ever do, or the head alone.

    The epochs are of a few batches and validation images; both are scaled to the complete splits. `on_step` may raise to
    end it. All learning rates are almost zero, which changes no time and lets nothing diverge. Where images grow, those of
    about the mean size are trained on.
    """
    data = data.at(recipe.data)
    batch_size = min(recipe.training.batch_size, len(data.train.images))
    steps = len(data.train.images) // batch_size
    part = few_images(data, min(steps, _STEPS[device.type]) * batch_size, _VALIDATION[device.type])
    frozen = _MANY_EPOCHS if head_only else 0
    watch, start, last_metrics = Stopwatch(device), time.perf_counter(), {}

    def on_epoch(report: EpochReport) -> None:
        last_metrics.update(report.metrics)
        if report.epoch == 1:
            watch.restart()
        elif time.perf_counter() - start >= seconds:
            raise _Measured

    changes = {
        "training.epochs": _MANY_EPOCHS,
        "transfer.frozen_epochs": frozen,
        "curriculum.start_size": mean_size(recipe) if recipe.curriculum.start_size else 0,
    }
    try:
        train(_hardly_learning(recipe, changes), part, device, on_epoch, on_step, watch)
    except _Measured:
        watch("tracking")
    total, num_steps = watch.seconds()
    epochs = num_steps // min(steps, _STEPS[device.type])
    share = len(data.validation.images) / len(part.validation.images)
    return Speed(
        batch_size=batch_size,
        steps=steps,
        step_s={name: total[name] / num_steps for name in PARTS if name not in ("evaluation", "tracking")},
        evaluation_s=total["evaluation"] / epochs * share,
        memory_gib=last_metrics["memory/peak_gib"],
    )


def measure_overhead(
    recipe: Recipe, data: TrainingData, device: torch.device, speed: Speed, tracker: Tracker
) -> Overhead:
    """Track a training of one step as `experiment.run` does, with a few validation images.

    The process should be warm: the first figures and the first run of a process take seconds more.
    """
    data = data.at(recipe.data)
    part = few_images(data, speed.batch_size, _VALIDATION[device.type])
    epoch_s = 0.0
    start = time.perf_counter()
    with tracker.run(RunRequest(name="bench", recipe=recipe, data=part)) as tracked:
        started_s = time.perf_counter() - start

        def on_epoch(report: EpochReport) -> None:
            nonlocal epoch_s
            epoch_start = time.perf_counter()
            tracked.log_metrics(split_metrics(report.metrics, data)[0], report.epoch)
            epoch_s = time.perf_counter() - epoch_start

        result = train(_hardly_learning(recipe, {"training.epochs": 1}), part, device, on_epoch)
        start = time.perf_counter()
        tracked.log_metrics(publish(tracked, recipe, part, result), 1)
        tracked.end(State.FINISHED)
    predicted_s = _other_views(recipe) * speed.evaluation_s * len(part.validation.images) / len(data.validation.images)
    return Overhead(started_s + max(0.0, time.perf_counter() - start - predicted_s), epoch_s)


def _hardly_learning(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """With almost no rate."""
    return recipe.changed({**changes, **dict.fromkeys(recipe.rates, 1e-9)})


def trial_seconds(recipe: Recipe, speed: Speed, overhead: Overhead) -> dict[str, float]:
    """Part of PARTS -> seconds of a complete trial on the complete data set.

    The steps of all epochs; an evaluation after each, and one more for each view that the prediction methods use; as
    tracking, the metrics of each epoch, the run's start, and its end with scores, figures and files.
    """
    epochs = recipe.training.epochs
    return {
        **{part: seconds * speed.steps * epochs for part, seconds in speed.step_s.items()},
        "evaluation": speed.evaluation_s * (epochs + _other_views(recipe)),
        "tracking": overhead.trial_s + overhead.epoch_s * epochs,
    }


def _other_views(recipe: Recipe) -> int:
    """How many more than the images themselves `publish` predicts."""
    flip, shift = views_of(recipe)
    return flip + 2 * (shift > 0)


def few_images(data: TrainingData, num_train: int, num_validation: int) -> TrainingData:
    """So many images of both splits, evenly spaced: a folder's images are sorted by class."""

    def few(split: Split, count: int) -> Split:
        stride = max(1, len(split.images) // count)
        return split.at(slice(0, stride * count, stride))

    validation = few(data.validation, num_validation)
    ids = data.validation_ids[: len(validation.images)]
    return replace(data, train=few(data.train, num_train), validation=validation, validation_ids=ids)
