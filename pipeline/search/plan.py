"""What a study will cost: a forecast from a few measured steps, and what it came to."""

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.trial import TrialState

from pipeline.data.prepare import TrainingData
from pipeline.recipe import Recipe
from pipeline.search.pruner import WHOLE
from pipeline.search.replay import rule, simulate
from pipeline.search.storage import num_finished
from pipeline.search.study import Search
from pipeline.speed import measure, measure_overhead, trial_seconds
from pipeline.tracking.runs import NullTracker, Run
from pipeline.tracking.sqlite import checkpoint

CONTROL_S = 1.5  # of measuring the base recipe; on slow networks two short epochs take longer
OTHERS = 3  # random recipes, while all the measuring takes less than SHARE of the forecast
SHARE = 0.02
DRAWS = 200  # random recipes whose epochs are looked at
# Not measured each time, or it would leave a run behind; seen on 2 CPU cores: 0.05 to 0.1 s a trial beside the epochs'
# numbers, 326 and 330 bytes a number in databases of 12,816 and 7,243, of which the machine's monitor wrote 1.5 a second.
TRACKING_S = 0.1
WORKER_START_S = 6.0  # of a process's start until its first trial; seen: 6.0 s of processor time with digits
ROW_BYTES = 330
EPOCH_NUMBERS = 9
MACHINE_NUMBERS_PER_S = 1.5
SIMULATED = 1000  # trials at most, in one study or several


@dataclass(frozen=True)
class Forecast:
    """What the trials that are left will take; times in seconds. `unpruned_*`: if no trial is stopped."""

    trials: int
    seconds: float
    unpruned_seconds: float
    epochs: float
    unpruned_epochs: float
    pruned: float  # trials
    epoch_s: float
    disk_mib: float
    memory_gib: float | None  # of a GPU; the most of the measured recipes
    measured: int  # recipes, the control the first


@dataclass(frozen=True)
class Actual:
    """What they took."""

    trials: int
    seconds: float
    epochs: int
    pruned: int
    epoch_s: float  # of each trial's last epoch, weighted by its epochs
    disk_mib: float


def forecast(
    search: Search,
    data: TrainingData,
    device: torch.device,
    study: optuna.Study | None,
    on_step: Callable[[int, int, int], None] = lambda epoch, step, steps: None,
    workers: int = 1,
) -> Forecast | None:
    """Measure the control and a few random recipes; None where no trial is left. `study` is what is stored so far.

    Time: the mean of the measured epochs, times the mean epochs of random recipes of the space (the search will come to
    prefer some, which isn't foreseen), and what a trial takes beside. Pruned: what the pruner does with trials whose
    scores are random and keep their order, which is what three live studies came to (studies/README.md). Other work on
    the machine changes all of it. `on_step` may raise to end it. Several `workers` share the work, on a CPU as far as
    there are cores, with one thread each.
    """
    with _one_thread() if workers > 1 and device.type == "cpu" else contextlib.nullcontext():
        return _forecast(search, data, device, study, on_step, workers)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _forecast(
    search: Search,
    data: TrainingData,
    device: torch.device,
    study: optuna.Study | None,
    on_step: Callable[[int, int, int], None],
    workers: int,
) -> Forecast | None:
    done = num_finished(study) if study else 0
    left = search.trials - done
    if left <= 0:
        return None
    counter = _FileCounter()
    began = time.perf_counter()
    control = search.base
    speeds = [measure(control, data, device, CONTROL_S, on_step)]
    overhead = measure_overhead(control, data, device, speeds[0], counter)
    whole_s = sum(trial_seconds(control, speeds[0], overhead).values()) + TRACKING_S
    recipes = _random_recipes(search)
    for recipe in recipes[:OTHERS]:
        if time.perf_counter() - began > SHARE * whole_s * left:
            break
        speeds.append(measure(recipe, data, device, CONTROL_S / 3, on_step))

    epochs = statistics.mean(recipe.training.epochs for recipe in recipes)
    epoch_s = statistics.mean(speed.epoch_s for speed in speeds) + overhead.epoch_s
    end_s = whole_s - control.training.epochs * (speeds[0].epoch_s + overhead.epoch_s)
    at_once = min(workers, left, (os.cpu_count() or 1) if device.type == "cpu" else workers)
    share, pruned_share = _pruning(search, done, at_once)
    total, pruned = left * epochs, left * pruned_share
    used = share * total
    work_s = used * epoch_s + (left - pruned) * end_s
    start_s = WORKER_START_S if workers > 1 else 0.0
    numbers = used * EPOCH_NUMBERS + work_s * MACHINE_NUMBERS_PER_S
    return Forecast(
        trials=left,
        seconds=start_s + work_s / at_once,
        unpruned_seconds=start_s + (total * epoch_s + left * end_s) / at_once,
        epochs=used,
        unpruned_epochs=total,
        pruned=pruned,
        epoch_s=epoch_s,
        disk_mib=((left - pruned) * counter.bytes + numbers * ROW_BYTES) / 2**20,
        memory_gib=max(speed.memory_gib for speed in speeds) if device.type == "cuda" else None,
        measured=len(speeds),
    )


def actual(study: optuna.Study, before: int, seconds: float, disk_mib: float) -> Actual:
    """What the trials from number `before` on took; `seconds` and `disk_mib` are those of this command."""
    trials = [trial for trial in study.get_trials(deepcopy=False)[before:] if trial.state.is_finished()]
    epochs = sum(trial.user_attrs.get("epochs", 0) for trial in trials)
    return Actual(
        trials=len(trials),
        seconds=seconds,
        epochs=epochs,
        pruned=sum(trial.state is TrialState.PRUNED for trial in trials),
        epoch_s=_epoch_s(trials),
        disk_mib=disk_mib,
    )


def size_mib(folder: Path) -> float:
    """Of all files in a folder; what waits in a write-ahead log is put into its database first."""
    for database in folder.glob("*.db"):
        checkpoint(database)
    size = 0
    for place, _, names in os.walk(folder):  # which goes on where a folder has just gone
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a journal goes as soon as MLflow has it
                size += os.stat(Path(place, name)).st_size
    return size / 2**20


def _epoch_s(trials: list[optuna.trial.FrozenTrial]) -> float:
    seconds = [trial.user_attrs.get("epoch_s", math.nan) for trial in trials]
    epochs = [trial.user_attrs.get("epochs", 0) for trial in trials]
    known = [(s * n, n) for s, n in zip(seconds, epochs, strict=True) if n and math.isfinite(s)]
    return sum(s for s, _ in known) / sum(n for _, n in known) if known else math.nan


def _random_recipes(search: Search) -> list[Recipe]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=search.base.training.seed))
    recipes = []
    for _ in range(DRAWS if "training.epochs" in search.space() else OTHERS):
        trial = study.ask()
        search.ask(trial)
        recipes.append(search.recipe(trial.params))
    return recipes


def _pruning(search: Search, done: int, workers: int = 1) -> tuple[float, float]:
    """(share of their epochs that the trials from number `done` on train, share of them that is pruned)."""
    random = np.random.RandomState(0)
    trials, epochs = min(search.trials, SIMULATED), search.most_epochs
    first = done * trials // search.trials
    studies = SIMULATED // trials
    used, completed = 0, 0
    for _ in range(studies):
        scores = random.rand(trials)
        curves = np.repeat(scores[:, None], epochs, axis=1).tolist()
        for sign, part in ((1, curves), (-1, curves[:first])):  # with one worker the first don't know those behind them
            trained, ended = simulate(part, rule(search.pruner(), ""), workers, WHOLE)
            used, completed = used + sign * trained, completed + sign * len(ended)
    left = studies * (trials - first)
    return used / (left * epochs), 1 - completed / left


class _FileCounter(NullTracker):
    """Counts the bytes of the files that a run is given, and keeps none."""

    bytes = 0

    @contextlib.contextmanager
    def run(self, *arguments: Any, **named: Any) -> Iterator[Run]:
        """See Tracker."""
        with super().run(*arguments, **named) as run:
            run.log_files = self._count  # type: ignore[method-assign]
            yield run

    def _count(self, folder: Path) -> None:
        self.bytes += sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
