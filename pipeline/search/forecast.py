"""What a study will cost, by a few measured steps, and what it really took."""

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.trial import TrialState

from pipeline.data.prepare import TrainingData
from pipeline.recipe import Recipe
from pipeline.search.search import Search
from pipeline.search.short_trials import short_epochs, simulate
from pipeline.search.speed import (
    CONTROL_S,
    TRACKING_S,
    WORKER_START_S,
    RecipeFails,
    measure_mean,
    measure_overhead,
    trial_seconds,
)
from pipeline.search.stored_study import num_finished
from pipeline.search.study_attributes import Choice
from pipeline.search.trial_attributes import TrialAttributes, is_feasible
from pipeline.tracking.sqlite import checkpoint
from pipeline.tracking.tracker import NullTracker, Run
from pipeline.training.placement import threads_of_each, use_threads

NUM_OTHER_RECIPES = 3  # random ones, while all measuring takes less than MEASURING_FRACTION of the forecast time
MEASURING_FRACTION = 0.02
NUM_DRAWN_RECIPES = 200  # random ones whose epochs are averaged
METRIC_BYTES = 330  # of a metric in a database, measured: 326 and 330 of 12,816 and 7,243 metrics
SYSTEM_METRICS_PER_S = 1.5  # of the system monitor
NUM_SIMULATED_TRIALS, NUM_SIMULATED_STUDIES = 100, 10  # at most


@dataclass(frozen=True)
class Forecast:
    """What the remaining trials will take; times in seconds. `unpruned_*`: if no trial is pruned."""

    trials: int
    seconds: float
    unpruned_seconds: float
    epochs: float
    unpruned_epochs: float
    pruned: float  # trials
    epoch_s: float
    disk_mib: float
    memory_gib: float | None  # of a GPU; the maximum of the measured recipes
    measured: int  # recipes, including the control
    choice: Choice | None = None  # of execution and workers
    unknown_pruner: str = ""  # a pruner whose effect is not known: none is assumed


@dataclass(frozen=True)
class Actual:
    """What they took."""

    trials: int
    seconds: float
    epochs: int
    pruned: int
    epoch_s: float  # of each trial's last epoch, weighted by its epochs
    disk_mib: float


@dataclass(frozen=True)
class Costs:
    """What trials take on this machine; times in seconds."""

    epoch_s: float  # an epoch, with what its metrics take
    end_s: float  # what a complete trial takes besides its epochs
    start_s: float = 0.0  # before the first trial
    parallel: int = 1  # trials that advance at once, at most
    taken: float = 0.0  # see Choice
    file_bytes: int = 0  # of a complete trial
    epoch_metrics: int = 0  # logged after an epoch
    end_metrics: int = 0  # logged when a complete trial ends
    memory_gib: float | None = None  # of a GPU; the maximum of the measured recipes
    measured: int = 0  # recipes, including the control

    def trial_s(self, epochs: float) -> float:
        """A complete trial."""
        return epochs * self.epoch_s + self.end_s


def forecast(
    search: Search,
    data: TrainingData,
    device: torch.device,
    study: optuna.Study | None,
    choice: Choice,
    on_step: Callable[[int, int, int], None] = lambda epoch, step, steps: None,
) -> Forecast | None:
    """Measure the control and a few random recipes; None where no trial remains to be run. `study` is what is stored so far.

    `on_step` may raise to end the measuring.
    """
    done = num_finished(study) if study else 0
    if search.trials <= done or (study and search.why_exhausted(study)):
        return None
    costs = measure_costs(search, data, device, choice, search.trials - done, on_step=on_step)
    return replace(estimate(search, costs, search.trials, done, mean_epochs(search)), choice=choice)


def measure_costs(
    search: Search,
    data: TrainingData,
    device: torch.device,
    choice: Choice,
    trials: int,
    total_s: float = math.inf,
    on_step: Callable[[int, int, int], None] = lambda epoch, step, steps: None,
) -> Costs:
    """Measure the control and up to three random recipes, as far as that pays: for so many trials, in `total_s` at most.

    Several workers share a CPU's threads, as far as there are cores, and a GPU as far as the `choice` found it free. Other
    work on the machine changes all of it.
    """
    counter, on_cpu, start = _Counter(), device.type == "cpu", time.perf_counter()
    with use_threads(threads_of_each(choice.workers) if on_cpu else None):
        control = search.base
        speeds = [measure_mean(control, data, device, CONTROL_S, on_step)]
        overhead = measure_overhead(control, data, device, speeds[0], counter)
        trial_s = sum(trial_seconds(control, speeds[0], overhead).values()) + TRACKING_S
        for recipe in _random_recipes(search, NUM_OTHER_RECIPES):
            if time.perf_counter() - start > MEASURING_FRACTION * min(total_s, trial_s * trials):
                break
            with contextlib.suppress(RecipeFails):  # as a trial it fails, and the study goes on
                speeds.append(measure_mean(recipe, data, device, CONTROL_S / 3, on_step))
    return Costs(
        epoch_s=statistics.mean(speed.epoch_s for speed in speeds) + overhead.epoch_s,
        end_s=trial_s - control.training.epochs * (speeds[0].epoch_s + overhead.epoch_s),
        start_s=WORKER_START_S if choice.workers > 1 or not on_cpu else 0.0,
        parallel=min(choice.workers, os.cpu_count() or 1) if on_cpu else choice.workers,
        taken=choice.taken,
        file_bytes=counter.bytes,
        epoch_metrics=sum(counter.metrics[:1]),
        end_metrics=sum(counter.metrics[1:]),
        memory_gib=None if on_cpu else max(speed.memory_gib for speed in speeds),
        measured=len(speeds),
    )


def estimate(search: Search, costs: Costs, trials: int, done: int, epochs: float) -> Forecast:
    """What the trials from number `done` up to `trials` in all, of `epochs` on average, take at these costs.

    Which recipes the search will prefer is not known: random ones are assumed. Pruned: short trials, as many as there are
    where scores are random; none where the study has a pruner.
    """
    remaining = trials - done
    parallel = min(costs.parallel, remaining)
    used_fraction, pruned_fraction = _pruning(search, trials, done)
    all_epochs, pruned = remaining * epochs, remaining * pruned_fraction
    used_epochs = used_fraction * all_epochs
    work_s = used_epochs * costs.epoch_s + (remaining - pruned) * costs.end_s
    time_fraction = max(1 / parallel, costs.taken)  # of the time that one worker would take for all trials
    num_metrics = used_epochs * costs.epoch_metrics + (remaining - pruned) * costs.end_metrics
    num_metrics += work_s * SYSTEM_METRICS_PER_S
    return Forecast(
        trials=remaining,
        seconds=costs.start_s + work_s * time_fraction,
        unpruned_seconds=costs.start_s + (all_epochs * costs.epoch_s + remaining * costs.end_s) * time_fraction,
        epochs=used_epochs,
        unpruned_epochs=all_epochs,
        pruned=pruned,
        epoch_s=costs.epoch_s,
        disk_mib=((remaining - pruned) * costs.file_bytes + num_metrics * METRIC_BYTES) / 2**20,
        memory_gib=costs.memory_gib,
        measured=costs.measured,
        unknown_pruner=type(search.study.pruner).__name__ if search.prune and search.study.pruner else "",
    )


def remaining_epochs(search: Search, trials: int, done: int, epochs: float) -> float:
    """What the trials from number `done` up to `trials`, of `epochs` on average, will be trained, as `estimate` has it."""
    return (trials - done) * epochs * _pruning(search, trials, done)[0] if trials > done else 0.0


def actual(study: optuna.Study, first: int, seconds: float, disk_mib: float) -> Actual:
    """What the trials from number `first` on took; `seconds` and `disk_mib` are those of this command."""
    trials = [trial for trial in study.get_trials(deepcopy=False)[first:] if trial.state.is_finished()]
    return Actual(
        trials=len(trials),
        seconds=seconds,
        epochs=sum(TrialAttributes.of(trial).epochs for trial in trials),
        pruned=sum(trial.state is TrialState.PRUNED and is_feasible(trial) for trial in trials),
        epoch_s=_mean_epoch_s([TrialAttributes.of(trial) for trial in trials]),
        disk_mib=disk_mib,
    )


def size_mib(folder: Path) -> float:
    """Size of all files in a folder, after what waits in write-ahead logs was moved into their databases."""
    for database in folder.glob("*.db"):
        checkpoint(database)
    size = 0
    # Files and folders may disappear meanwhile: a journal is removed as soon as MLflow has it.
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size += os.stat(Path(parent, name)).st_size
    return size / 2**20


def _mean_epoch_s(trials: list[TrialAttributes]) -> float:
    """Seconds of each trial's last epoch, weighted by its epochs; NaN where none is known."""
    known = [(trial.epoch_s, trial.epochs) for trial in trials if trial.epochs and trial.epoch_s is not None]
    return sum(s * n for s, n in known) / sum(n for _, n in known) if known else math.nan


def mean_epochs(search: Search) -> float:
    """Of a trial that is not pruned; of random recipes where the space asks for them."""
    if not search.values("training.epochs"):
        return search.max_epochs
    return statistics.mean(recipe.training.epochs for recipe in _random_recipes(search, NUM_DRAWN_RECIPES))


def _random_recipes(search: Search, count: int) -> list[Recipe]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=search.base.training.seed))
    recipes = []
    for _ in range(count):
        trial = study.ask()
        search.ask(trial)
        recipes.append(search.recipe(trial.params))
    return recipes


def _pruning(search: Search, trials: int, done: int) -> tuple[float, float]:
    """Of the trials from number `done` up to `trials`: (fraction of their epochs that is trained, fraction pruned)."""
    if not search.shortens_of(trials):
        return 1.0, 0.0
    random, simulated = np.random.RandomState(0), min(trials, NUM_SIMULATED_TRIALS)
    first = done * simulated // trials
    studies = [[True, *simulate(random.rand(simulated - 1).tolist())][first:] for _ in range(NUM_SIMULATED_STUDIES)]
    in_full = statistics.mean(statistics.mean(study) for study in studies)
    return in_full + (1 - in_full) * short_epochs(search.max_epochs) / search.max_epochs, 1 - in_full


class _Counter(NullTracker):
    """Counts what a run is given, and keeps none of it: the bytes of its files, and the metrics of each call."""

    def __init__(self) -> None:
        self.bytes = 0
        self.metrics: list[int] = []

    @contextlib.contextmanager
    def run(self, *arguments: Any, **options: Any) -> Iterator[Run]:
        """See Tracker."""
        with super().run(*arguments, **options) as run:
            run.log_files = self._count_files  # type: ignore[method-assign]
            run.log_metrics = self._count_metrics  # type: ignore[method-assign]
            yield run

    def _count_files(self, folder: Path) -> None:
        self.bytes += sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    def _count_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.metrics.append(len(metrics))
