"""The one loop that trains. It knows neither MLflow nor Optuna: `on_epoch` is its only way out."""

import contextlib
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.data.augment import Augmenter, normalise
from pipeline.data.datasets import Split
from pipeline.data.prepare import TrainingData
from pipeline.evaluation.logits import autocast, predict_logits
from pipeline.evaluation.scores import accuracy_from, f1_macro_from
from pipeline.models.build import build_network
from pipeline.models.layers import FitsFirstLayer
from pipeline.recipe import Recipe
from pipeline.runtime import keep_freed_memory
from pipeline.training.averaging import WeightAverage
from pipeline.training.execution import GraphedStep, check_execution, forward_of, is_graphed, own_stream
from pipeline.training.losses import soft_cross_entropy
from pipeline.training.optimizers import build_optimizer, set_lr
from pipeline.training.resume import Parts, Resume

FIRST_LAYER_IMAGES = 5000  # as many as the speed runs take; a covariance of 12 numbers needs no more

# What the time of a training goes to. "data" gathers a batch's pixels, crop and mirror folded into the gather, after the
# set-up of network and images; "tracking" is what the callbacks take. The whole of a replayed graph counts as "forward".
PARTS = ("data", "augmentation", "forward", "backward", "optimizer", "evaluation", "tracking")


class Diverged(ArithmeticError):
    """The loss is no longer a finite number."""


@dataclass(frozen=True)
class EpochReport:
    """What an epoch measured; `metrics` by MLflow name, losses in nats, times in seconds."""

    epoch: int  # from 1
    metrics: dict[str, float]


@dataclass(frozen=True)
class Result:
    """A finished training. The last epoch counts, not the best: choosing an epoch by its score would flatter it."""

    network: nn.Module  # the averaged weights where the recipe averages, else the trained ones
    plain: nn.Module | None  # the trained weights, where `network` holds averaged ones
    validation_logits: Tensor  # (num_validation, num_classes) float32, of `network`
    history: list[EpochReport]
    seconds: float


def train(
    recipe: Recipe,
    data: TrainingData,
    device: torch.device,
    on_epoch: Callable[[EpochReport], None] = lambda report: None,
    on_step: Callable[[int, int, int], None] = lambda epoch, step, steps: None,
    on_part: Callable[[str], None] = lambda part: None,
    score_plain: bool = False,
    resume: Resume | None = None,
) -> Result:
    """Train a recipe's network on `data` and score it on the validation split after every epoch.

    `on_epoch` may raise to end the training. `on_step(epoch, step, steps)`, from 1, tells how far it is, by the host's count:
    nothing is read from the device inside an epoch but a copy of the loss that has already arrived.
    `on_part(part)` is told which of PARTS the time belongs to from here on; it must not wait for the device either.
    With `score_plain`, a recipe that averages its weights has the trained ones scored too, for another evaluation an
    epoch: `plain/accuracy` beside `val/accuracy`, and so on.
    With `resume`, the training goes on after the epoch whose state lies there, reports no epoch before it again, and
    its result is that of a training never stopped, in `history` and `seconds` too; and it keeps its own state there.
    An epoch's data order, augmentation and dropout depend on (seed, epoch) alone; on a CPU with the same number of
    threads, and on a GPU with `training.deterministic`, equal recipes give equal weights, bit for bit.
    Raises Diverged as soon as a loss is seen that is not finite, UserError where the device has no such
    `training.execution`, or the state to go on from is of another recipe or data.
    """
    settings = recipe.training
    images, labels = data.train.images, data.train.labels
    batch_size = min(settings.batch_size, len(images))
    steps = len(images) // batch_size  # what doesn't fill a batch waits for another epoch's order
    history: list[EpochReport] = []
    check_execution(recipe, device)
    graphed = is_graphed(recipe)
    on_part("data")
    started = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        keep_freed_memory()

    with _reproducible(settings.deterministic, device), own_stream(device) if graphed else contextlib.nullcontext():
        network = build_network(recipe.model, len(data.classes), data.image_size, settings.seed)
        network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if isinstance(network, FitsFirstLayer):
            evenly = math.ceil(len(images) / FIRST_LAYER_IMAGES)  # a folder's images come class by class
            network.fit_first_layer(normalise(images[::evenly], data.mean, data.std))
        average = WeightAverage(network, settings.ema_decay, graphed) if settings.ema_decay else None
        judged = average.network if average else network
        optimizer = build_optimizer(network, recipe.optimizer, device, graphed)
        parts = Parts(network, optimizer, average)
        if resume:
            resume.restore(recipe, data, parts)
            history += [EpochReport(epoch, metrics) for epoch, metrics in enumerate(resume.history, start=1)]
            started -= resume.seconds
        coins = _stream(settings.seed, 0, "flip")
        augmenter = Augmenter(images, labels, len(data.classes), data.mean, data.std, recipe.augmentation, coins)
        generator = torch.Generator(device)
        watch = _LossWatch(device)
        forward = forward_of(network, recipe)
        indices = torch.zeros(batch_size, dtype=torch.int64, device=device)
        last_loss, loss_sum, num_correct = (torch.zeros((), device=device) for _ in range(3))

        def train_step(on_part: Callable[[str], None] = lambda part: None) -> None:
            """Learn from the images `indices`. What outlives the step stays where it is, so that it can be replayed."""
            batch, targets = augmenter.batch(indices, generator, on_part)
            on_part("forward")
            with autocast(device, settings.precision):
                logits = forward(batch)
            loss = soft_cross_entropy(logits, targets, recipe.loss.label_smoothing)
            with torch.no_grad():
                last_loss.copy_(loss)
                loss_sum.add_(loss)
                num_correct.add_((logits.argmax(1) == targets.argmax(1)).sum())
            on_part("backward")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            on_part("optimizer")
            if settings.clip_norm:
                nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
            optimizer.step()
            if average:
                average.update(network)

        graphed_step = GraphedStep(train_step, generator) if graphed else None
        parameters = list(network.parameters())

        for epoch in range(len(history) + 1, settings.epochs + 1):
            epoch_started = time.perf_counter()
            torch.manual_seed(_stream(settings.seed, epoch, "dropout"))
            generator.manual_seed(_stream(settings.seed, epoch, "data"))
            order = torch.randperm(len(images), generator=generator, device=device)
            loss_sum.zero_()
            num_correct.zero_()
            augmenter.start_epoch(epoch)
            network.train()
            for step in range(steps):
                set_lr(optimizer, recipe.schedule, (epoch - 1) * steps + step, settings.epochs * steps)
                indices.copy_(order[step * batch_size : (step + 1) * batch_size])
                if graphed_step:
                    on_part("forward")
                    graphed_step(form=tuple(p.requires_grad for p in parameters))
                else:
                    train_step(on_part)
                watch.look(last_loss, epoch, step)
                on_part("tracking")
                on_step(epoch, step + 1, steps)
                on_part("data")

            on_part("evaluation")
            of_training = torch.stack([loss_sum / steps, num_correct / (steps * batch_size)])
            logits = predict_logits(judged, data.validation.images, data.mean, data.std, settings.precision)
            measured = _measure(of_training, logits, data.validation)
            if score_plain and average:
                plain = predict_logits(network, data.validation.images, data.mean, data.std, settings.precision)
                scores = _measure(of_training, plain, data.validation)
                measured |= {
                    name.replace("val/", "plain/"): value for name, value in scores.items() if name.startswith("val/")
                }
            seconds = time.perf_counter() - epoch_started
            report = EpochReport(
                epoch,
                measured
                | {
                    "optimizer/lr": float(optimizer.param_groups[0]["lr"]),
                    "time/epoch_s": seconds,
                    "throughput/images_per_s": steps * batch_size / seconds,
                    "memory/peak_gib": _peak_gib(device),
                },
            )
            if not (math.isfinite(measured["train/loss"]) and math.isfinite(measured["val/loss"])):
                raise Diverged(f"loss is not finite after epoch {epoch}")
            history.append(report)
            on_part("tracking")
            on_epoch(report)
            if resume and epoch < settings.epochs:
                resume.save_if_due(parts, [past.metrics for past in history], time.perf_counter() - started)
            on_part("data")

    return Result(judged, network if average else None, logits, history, time.perf_counter() - started)


def _measure(train: Tensor, logits: Tensor, validation: Split) -> dict[str, float]:
    """An epoch's losses and scores, in the epoch's one transfer from the device.

    train: (2,) loss and accuracy; accuracy is against each target's largest class, which mixing makes hard to reach.
    """
    classes = torch.arange(logits.shape[1], device=logits.device)
    true = (validation.labels[:, None] == classes).float()
    predicted = (logits.argmax(1)[:, None] == classes).float()
    confusion = true.T @ predicted
    loss = cross_entropy(logits, validation.labels)
    numbers = torch.cat([train, loss[None], confusion.flatten()]).double().cpu().numpy()
    matrix = numbers[3:].reshape(len(classes), -1).round().astype("int64")
    return {
        "train/loss": float(numbers[0]),
        "train/accuracy": float(numbers[1]),
        "val/loss": float(numbers[2]),
        "val/accuracy": accuracy_from(matrix),
        "val/f1_macro": f1_macro_from(matrix),
    }


class _LossWatch:
    """Sees a loss that is not finite within a few steps, without making the host wait for a GPU."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._arrived = torch.zeros((), pin_memory=self._on_gpu)
        self._copied: torch.cuda.Event | None = None

    def look(self, loss: Tensor, epoch: int, step: int) -> None:
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


def _stream(seed: int, epoch: int, use: str) -> int:
    """A seed of its own for each epoch and use, so that an epoch can be repeated without those before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}/{use}".encode()).digest()[:7])


@contextlib.contextmanager
def _reproducible(deterministic: bool, device: torch.device) -> Iterator[None]:
    """Set the global switches a run depends on, and put them back: its random state, and how a GPU computes."""
    gpus = [device] if device.type == "cuda" else []
    was = torch.are_deterministic_algorithms_enabled()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS may add in another order
    with (
        torch.random.fork_rng(devices=gpus),
        torch.backends.cudnn.flags(enabled=True, benchmark=not deterministic, deterministic=deterministic),
    ):
        if deterministic != was:  # torch imports its compiler to change it, which takes a second
            torch.use_deterministic_algorithms(deterministic)
        try:
            yield
        finally:
            if deterministic != was:
                torch.use_deterministic_algorithms(was)


def _peak_gib(device: torch.device) -> float:
    """Most memory in use so far, GiB: of this training on a GPU; on a CPU, of the process, earlier trainings included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
