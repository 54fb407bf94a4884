"""The training loop. It knows neither MLflow nor Optuna: it reports by callbacks, and `on_epoch` may end it."""

import contextlib
import hashlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.data.augment import Augmenter, RandomCrop, normalise
from pipeline.data.datasets import Split
from pipeline.data.mapped import MappedImages
from pipeline.data.policies import num_views
from pipeline.data.prepare import TrainingData
from pipeline.data.sampler import Sampler
from pipeline.evaluation.logits import autocast, predict_logits
from pipeline.evaluation.scores import CLASS_F1, accuracy_from, balanced_accuracy_from, f1_from, metric_names
from pipeline.models.build import check_sizes, initial_network, pixel_statistics_of
from pipeline.models.layers import FitsFirstLayer
from pipeline.recipe import Recipe
from pipeline.runtime import keep_freed_memory, peak_memory_gib, restart_peak_memory
from pipeline.sections.augmentation import AugMix
from pipeline.training import progressive
from pipeline.training.averaging import WeightAverage
from pipeline.training.checkpoints import load_initial
from pipeline.training.execution import (
    GraphedStep,
    check_execution,
    forward_of,
    is_graphed,
    now,
    own_stream,
    seconds_between,
)
from pipeline.training.freezing import Freezing
from pipeline.training.losses import consistency_loss, loss_of
from pipeline.training.optimizers import build_optimizer, set_lr
from pipeline.training.origin import check_initial
from pipeline.training.resume import Parts, Resume
from pipeline.training.schedules import lr_factor
from pipeline.training.teacher import fixed_logits, load_teacher

FIRST_LAYER_IMAGES = 5000  # as many as the speed runs take; a covariance of 12 numbers needs no more

# What a training spends its time on. "data" is the set-up of network and images, and then gathering each batch's pixels,
# which crops and mirrors them; "tracking" is what the callbacks take. A replayed graph counts as "forward" in full.
PARTS = ("data", "augmentation", "forward", "backward", "optimizer", "evaluation", "tracking")


OnPart = Callable[[str], None]


def _ignore(*arguments: object) -> None:
    """The callback that does nothing."""


class Diverged(ArithmeticError):
    """The loss is no longer a finite number."""


@dataclass(frozen=True)
class EpochReport:
    """What an epoch measured; `metrics` by MLflow name, losses in nats, times in seconds."""

    epoch: int  # from 1
    metrics: dict[str, float]

    def without_classes(self) -> "EpochReport":
        """The report without the F1 of each class: a thousand of these in each epoch are too many to keep."""
        kept = {name: value for name, value in self.metrics.items() if not name.startswith(CLASS_F1)}
        return replace(self, metrics=kept)


@dataclass(frozen=True)
class Result:
    """A finished training, as it was after the last epoch: choosing the epoch with the best score would bias the score."""

    network: nn.Module  # the averaged weights where the recipe averages, else the trained ones
    plain: nn.Module | None  # the trained weights, where `network` holds averaged ones
    validation_logits: Tensor  # (num_validation, num_classes) float32, of `network`
    history: list[EpochReport]  # of each class's F1 the last epoch's alone
    seconds: float


def train(
    recipe: Recipe,
    data: TrainingData,
    device: torch.device,
    on_epoch: Callable[[EpochReport], None] = _ignore,
    on_step: Callable[[int, int, int], None] = _ignore,
    on_part: OnPart = _ignore,
    resume: Resume | None = None,
) -> Result:
    """Train a recipe's network on `data` and score it on the validation split after every epoch.

    `on_epoch` may raise to end the training. `on_step(epoch, step, steps)`, from 1, reports progress by the host's count:
    within an epoch only the loss is read from the device, and only a copy that has arrived already.
    `on_part(part)` is called where the time starts to belong to another of PARTS; it must not wait for the device.
    With `resume`, the training continues after the epoch whose state is saved there and does not report earlier epochs
    again; its result, `history` and `seconds` included, is that of an uninterrupted training. It saves its state there.
    An epoch's data order, augmentation and dropout depend on (seed, epoch) alone; on a CPU with the same number of
    threads, and on a GPU with `training.deterministic`, equal recipes give equal weights, bit for bit.
    Raises Diverged as soon as a loss that is not finite is seen, UserError where the device does not support the recipe's
    `training.execution`, the network takes no smaller images and they are to grow, there is no such teacher, it or the
    weights to start from don't suit the data, or where the saved state belongs to another recipe or other data.
    """
    check_execution(recipe, device)
    full = recipe.data.image_size
    check_sizes(recipe.model, full, progressive.smaller_sizes(full, recipe.curriculum.start_size))
    check_initial(recipe, data)
    data = normalised_for(recipe, data)
    settings, graphed = recipe.training, is_graphed(recipe)
    history: list[EpochReport] = []
    on_part("data")
    started = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        keep_freed_memory()
        restart_peak_memory()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_reproducible(settings.deterministic, device))
        if graphed:
            stack.enter_context(own_stream(device))
        learner = _Learner(recipe, data, device)
        if resume:
            resume.restore(recipe, data, learner.parts)
            history += [EpochReport(epoch, metrics) for epoch, metrics in enumerate(resume.history, start=1)]
            started -= resume.seconds
        graphed_step = GraphedStep(learner.step, learner.generator) if graphed else None
        if graphed_step:
            stack.callback(graphed_step.release)
        for epoch in range(len(history) + 1, settings.epochs + 1):
            epoch_started, begin = time.perf_counter(), now(device)
            learner.train_epoch(epoch, graphed_step, on_step, on_part)
            trained = now(device)
            on_part("evaluation")
            logits, metrics = learner.evaluate()
            seconds = time.perf_counter() - epoch_started
            training_s = seconds_between(begin, trained)  # both are past: the metrics have arrived
            report = EpochReport(epoch, metrics | learner.costs(epoch, seconds, training_s))
            if not (math.isfinite(metrics["train/loss"]) and math.isfinite(metrics["val/loss"])):
                raise Diverged(f"loss is not finite after epoch {epoch}")
            if history:
                history[-1] = history[-1].without_classes()
            history.append(report)
            on_part("tracking")
            on_epoch(report)
            if resume and epoch < settings.epochs:
                past = [earlier.metrics for earlier in history]
                resume.save_if_due(learner.parts, past, time.perf_counter() - started)
            on_part("data")
    plain = learner.parts.network if learner.parts.average else None
    return Result(learner.scored_network, plain, logits, history, time.perf_counter() - started)


def normalised_for(recipe: Recipe, data: TrainingData) -> TrainingData:
    """`data` with the mean and deviation of pixels that the network's initial weights expect, where there are any."""
    statistics = pixel_statistics_of(recipe.model)
    if statistics is None:
        return data
    mean, std = (torch.tensor(values, device=data.mean.device) for values in statistics)
    return replace(data, mean=mean, std=std)


class _Learner:
    """The network in training, with all that a step reads and changes.

    A captured graph reads and writes memory at fixed addresses. So every tensor that outlives a step is made once, here,
    and only changed in place.
    """

    def __init__(self, recipe: Recipe, data: TrainingData, device: torch.device):
        settings, transfer, images = recipe.training, recipe.transfer, data.train.images
        graphed = is_graphed(recipe)
        self._recipe, self._data, self._device = recipe, data, device
        self._batch_size = min(settings.batch_size, len(images))
        self._steps = len(images) // self._batch_size  # of an epoch; images that don't fill a batch are left out of it
        network = initial_network(recipe.model, len(data.classes), data.image_size, settings.seed)
        if transfer.weights_file:
            load_initial(transfer.weights_file, network)
        network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if isinstance(network, FitsFirstLayer) and not transfer.weights_file:  # the others learnt from that first layer
            seen = data.sample(FIRST_LAYER_IMAGES).to(device)
            network.fit_first_layer(normalise(seen, data.mean, data.std))
        average = WeightAverage(network, settings.ema_decay, graphed) if settings.ema_decay else None
        self.parts = Parts(network, build_optimizer(network, recipe.optimizer, device, graphed, transfer), average)
        self.scored_network = average.network if average else network
        self._parameters = list(network.parameters())
        self._freezing = Freezing(network, transfer) if transfer.frozen_epochs or transfer.frozen_share else None
        self._sampler = Sampler(data.train.labels, len(data.classes), recipe.data)
        self._loss = loss_of(recipe.loss, data.train.labels, len(data.classes))
        aspects = data.train.aspects
        self._f1_names = [f"{CLASS_F1}{name}" for name in metric_names(data.classes)]
        self._augmenter = Augmenter(
            images,
            data.train.labels,
            len(data.classes),
            data.mean,
            data.std,
            recipe.augmentation,
            _seed_of(settings.seed, 0, "flip"),
            None if aspects is None else RandomCrop(data.image_size, recipe.data.crop_scale, aspects),
        )
        self.generator = torch.Generator(device)
        self._loss_watch = _LossWatch(device)
        self._forward = forward_of(network, recipe)
        teacher = load_teacher(recipe, data, device)
        self._taught = fixed_logits(teacher, recipe, data) if teacher else None
        self._teacher = forward_of(teacher, recipe) if teacher else None
        self._size = data.image_size
        self._indices = torch.zeros(self._batch_size, dtype=torch.int64, device=device)
        self._last_loss, self._loss_sum, self._num_correct = (torch.zeros((), device=device) for _ in range(3))

    def train_epoch(
        self,
        epoch: int,
        graphed_step: GraphedStep | None,
        on_step: Callable[[int, int, int], None],
        on_part: OnPart,
    ) -> None:
        """Train for an epoch (from 1), by `graphed_step` where there is one, else by `step`."""
        settings, steps = self._recipe.training, self._steps
        torch.manual_seed(_seed_of(settings.seed, epoch, "dropout"))
        self.generator.manual_seed(_seed_of(settings.seed, epoch, "data"))
        order = self._sampler.epoch(self.generator)
        self._loss_sum.zero_()
        self._num_correct.zero_()
        self._augmenter.start_epoch(epoch, progressive.strength(self._recipe, epoch))
        self._size = progressive.image_size(self._recipe, epoch)
        self.parts.network.train()
        if self._freezing:
            self._freezing.start_epoch(epoch)
        order = order[: steps * self._batch_size]
        for step, (indices, images) in enumerate(zip(order.split(self._batch_size), self._loaded(order), strict=False)):
            if images is not None:
                self._augmenter.load(images)
            set_lr(self.parts.optimizer, self._recipe.schedule, (epoch - 1) * steps + step, settings.epochs * steps)
            self._indices.copy_(indices)
            if graphed_step:
                on_part("forward")
                graphed_step(form=(self._size, *(p.requires_grad for p in self._parameters)))
            else:
                self.step(on_part)
            self._loss_watch.check_newest(self._last_loss, epoch, step)
            on_part("tracking")
            on_step(epoch, step + 1, steps)
            on_part("data")

    def _loaded(self, order: Tensor) -> Iterator[Tensor | None]:
        """The images of each batch, where they lie in a file."""
        images = self._data.train.images
        if isinstance(images, MappedImages):
            return images.batches(order.cpu().split(self._batch_size))
        return repeat(None)

    def step(self, on_part: OnPart = _ignore) -> None:
        """Learn from the images `_indices`."""
        settings, network, optimizer = self._recipe.training, self.parts.network, self.parts.optimizer
        batch, targets = self._augmenter.batch(self._indices, self.generator, on_part)
        on_part("forward")
        with autocast(self._device, settings.precision):
            logits = self._forward(progressive.at_size(batch, self._size))
            teacher_logits = self._teacher_logits(batch[: len(targets)])
        loss, logits = self._loss_of_views(logits, targets, teacher_logits)
        with torch.no_grad():
            self._last_loss.copy_(loss)
            self._loss_sum.add_(loss)
            self._num_correct.add_((logits.argmax(1) == targets.argmax(1)).sum())
        on_part("backward")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        on_part("optimizer")
        if settings.clip_norm:
            nn.utils.clip_grad_norm_(self._parameters, settings.clip_norm)
        optimizer.step()
        if self.parts.average:
            self.parts.average.update(network)

    @torch.no_grad()
    def _teacher_logits(self, images: Tensor) -> Tensor | None:
        """Of a step's images, in full size, as the teacher was trained with; None where there is no teacher."""
        if self._taught is not None:
            return self._taught.index_select(0, self._indices)
        return self._teacher(images) if self._teacher else None

    def _loss_of_views(self, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss, and the logits (B, C) of the images themselves, of which further views may follow."""
        own, augmentation = logits[: len(targets)], self._recipe.augmentation
        loss = self._loss(own, targets, teacher_logits)
        if isinstance(augmentation, AugMix) and augmentation.consistency:
            loss = loss + augmentation.consistency * consistency_loss(logits, num_views(augmentation))
        return loss, own

    def evaluate(self) -> tuple[Tensor, dict[str, float]]:
        """Validation logits (num_validation, num_classes), and the epoch's losses and scores by MLflow name."""
        means = torch.stack([self._loss_sum / self._steps, self._num_correct / (self._steps * self._batch_size)])
        logits = self._validation_logits(self.scored_network)
        return logits, _metrics(means, logits, self._data.validation, self._f1_names)

    def _validation_logits(self, network: nn.Module) -> Tensor:
        data = self._data
        return predict_logits(network, data.validation.images, data.mean, data.std, self._recipe.training.precision)

    def costs(self, epoch: int, seconds: float, training_s: float) -> dict[str, float]:
        """Rate, time, throughput and memory of an epoch that took `seconds`, its steps `training_s`; by MLflow name."""
        schedule, steps, total = self._recipe.schedule, self._steps, self._recipe.training.epochs * self._steps
        factors = (lr_factor(schedule, step, total) for step in range((epoch - 1) * steps, epoch * steps))
        return {
            "optimizer/lr": self._recipe.optimizer.lr * statistics.fmean(factors),  # of the last step alone it may be 0
            "time/epoch_s": seconds,
            "throughput/images_per_s": self._steps * self._batch_size / training_s,
            "memory/peak_gib": _peak_gib(self._device),
        }


def _metrics(means: Tensor, logits: Tensor, validation: Split, f1_names: Sequence[str]) -> dict[str, float]:
    """An epoch's losses and scores, in the epoch's one transfer from the device.

    means: (2,), the training's loss and accuracy. The latter is against each target's largest class, which mixing makes
    hard to reach. f1_names: of each class's F1.
    """
    classes = torch.arange(logits.shape[1], device=logits.device)
    true = (validation.labels[:, None] == classes).float()
    predicted = (logits.argmax(1)[:, None] == classes).float()
    confusion = true.T @ predicted
    loss = cross_entropy(logits, validation.labels)
    numbers = torch.cat([means, loss[None], confusion.flatten()]).double().cpu().numpy()
    matrix = numbers[3:].reshape(len(classes), -1).round().astype("int64")
    f1 = f1_from(matrix)
    return {
        "train/loss": float(numbers[0]),
        "train/accuracy": float(numbers[1]),
        "val/loss": float(numbers[2]),
        "val/accuracy": accuracy_from(matrix),
        "val/balanced_accuracy": balanced_accuracy_from(matrix),
        "val/f1_macro": float(f1.mean()),
        **dict(zip(f1_names, f1.tolist(), strict=True)),
    }


class _LossWatch:
    """Detects a loss that is not finite within a few steps, without making the host wait for a GPU."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._arrived = torch.zeros((), pin_memory=self._on_gpu)
        self._copied: torch.cuda.Event | None = None

    def check_newest(self, loss: Tensor, epoch: int, step: int) -> None:
        """Raise Diverged if the newest loss that has arrived on the host is not finite."""
        if not self._on_gpu:
            self._check(loss.item(), epoch, step)
        elif self._copied is None:
            self._arrived.copy_(loss, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(loss.device))
        elif self._copied.query():
            self._copied = None
            self._check(self._arrived.item(), epoch, step)

    def _check(self, loss: float, epoch: int, step: int) -> None:
        if not math.isfinite(loss):
            raise Diverged(f"loss is {loss} in epoch {epoch}, step {step + 1}")


def _seed_of(seed: int, epoch: int, use: str) -> int:
    """A seed of its own for each epoch and use, so that an epoch can be repeated without those before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}/{use}".encode()).digest()[:7])


@contextlib.contextmanager
def _reproducible(deterministic: bool, device: torch.device) -> Iterator[None]:
    """Set the global switches a run depends on, and restore them: its random state, and how a GPU computes."""
    gpus = [device] if device.type == "cuda" else []
    before = torch.are_deterministic_algorithms_enabled()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS may add in another order
    with (
        torch.random.fork_rng(devices=gpus),
        torch.backends.cudnn.flags(enabled=True, benchmark=not deterministic, deterministic=deterministic),
    ):
        if deterministic != before:  # torch imports its compiler to change it, which takes a second
            torch.use_deterministic_algorithms(deterministic)
        try:
            yield
        finally:
            if deterministic != before:
                torch.use_deterministic_algorithms(before)


def _peak_gib(device: torch.device) -> float:
    """Most memory in use in this training, GiB: of a GPU, or on a CPU of the process."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else peak_memory_gib()
