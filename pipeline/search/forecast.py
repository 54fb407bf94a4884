"""What a study will cost: how its steps are executed, a forecast from a few measured ones, and what it came to."""

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.trial import TrialState

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError, first_line
from pipeline.recipe import Recipe
from pipeline.search.pruner import MIN_UNPRUNED_TRIALS
from pipeline.search.replay import rule, simulate
from pipeline.search.speed import measure, measure_overhead, trial_seconds
from pipeline.search.storage import num_finished
from pipeline.search.study import Search
from pipeline.tracking.sqlite import checkpoint
from pipeline.tracking.tracker import NullTracker, Run
from pipeline.training.execution import check_execution

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

# What may be chosen unasked: a graph replays eager's own kernels, while a compiled step rounds elsewhere and draws other
# numbers for its dropout, so that scores would depend on a stopwatch.
EXECUTIONS = {"cpu": ("eager",), "cuda": ("eager", "graphed")}
WORTH = 0.8  # of a study's time: what is less simple has to save a fifth of it
MOST_WORKERS = 4  # unasked; each takes a core and gigabytes, and the search knows less when it asks
CONTEXT_GIB = 1.0  # of a GPU, which a process takes before its first tensor


@dataclass(frozen=True)
class Way:
    """What a whole trial of the base recipe takes by one execution of its steps; times in seconds."""

    execution: str
    training_s: float  # with the evaluations: the device is taken
    tracking_s: float  # the run's start and end, pictures, files: the device is free
    memory_gib: float  # of a GPU


@dataclass(frozen=True)
class Choice:
    """How a study executes steps and by how many workers; JSON, stored with it. `why`: empty where nothing was measured."""

    execution: str
    workers: int
    taken: float = 0.0  # share of a trial's time in which no other can have the device
    why: str = ""


def choose(
    ways: Sequence[Way], trials: int, cores: int, free_gib: float, workers: int | None = None, failed: str = ""
) -> Choice:
    """The simplest that takes a study of so many trials hardly longer than the fastest; `workers`: not asked, or so many.

    One device gives no more than a whole trial in the shortest `training_s` of all `ways`, however many workers there
    are: a graph leaves it no pause, and processes take turns. A worker's memory may be twice the base recipe's.
    """
    least_s = min(way.training_s for way in ways)
    most = min(trials, cores, MOST_WORKERS, int(free_gib / (2 * max(way.memory_gib for way in ways) + CONTEXT_GIB)))
    counts = [workers] if workers else range(1, max(1, most) + 1)

    def seconds(way: Way, count: int) -> float:
        start_s = WORKER_START_S if count > 1 else 0.0
        return start_s + trials * max((way.training_s + way.tracking_s) / count, least_s)

    options = [(way, count) for count in counts for way in ways]  # the simplest first
    fastest_s = min(seconds(*option) for option in options)
    way, count = next(option for option in options if WORTH * seconds(*option) <= fastest_s)
    said = [f"{way.execution} {way.training_s + way.tracking_s:.3g} s" for way in ways] + ([failed] if failed else [])
    why = f"a whole trial takes {', '.join(said)}; the device is free for {way.tracking_s:.2g} s of it"
    return Choice(way.execution, count, least_s / (way.training_s + way.tracking_s), why)


def measure_ways(
    search: Search,
    data: TrainingData,
    device: torch.device,
    executions: Sequence[str],
    on_step: Callable[[int, int, int], None] = lambda epoch, step, steps: None,
) -> tuple[list[Way], str]:
    """Measure the base recipe, a few seconds by each execution; and the fault of those after the first that fail here.

    UserError where such a fault leaves the device of no use to this process.
    """
    ways: list[Way] = []
    failed = []
    overhead = None
    for execution in executions:
        recipe = search.base.changed({"training.execution": execution})
        try:
            speed = measure(recipe, data, device, CONTROL_S, on_step)
        except RuntimeError as error:  # as torch's are, of a capture and of memory
            if not ways:
                raise
            failed.append(f"{execution} fails ({first_line(error)})")
            _check_usable(device, failed[-1])
            continue
        if overhead is None:
            for _ in range(2):  # a process's first pictures take seconds more
                overhead = measure_overhead(recipe, data, device, speed, NullTracker())
        assert overhead
        seconds = trial_seconds(recipe, speed, overhead)
        tracking_s = seconds.pop("tracking") + TRACKING_S
        ways.append(Way(execution, sum(seconds.values()), tracking_s, speed.memory_gib))
    return ways, "; ".join(failed)


def _check_usable(device: torch.device, failed: str) -> None:
    """A capture that broke off may leave the generator of random numbers in it."""
    try:
        torch.rand((), device=device).item()
    except RuntimeError:
        raise UserError(f"{device}: {failed}; SET=training.execution=eager trains without") from None


def decide(
    search: Search,
    data: TrainingData,
    device: torch.device,
    study: optuna.Study | None,
    workers: int | None = None,
) -> tuple[Search, Choice]:
    """The search with its `training.execution`, and how many workers it gets. `study` is what is stored so far.

    What was typed wins, or written in the study's module; then what the study was begun with, as its trials are to be
    compared; a new study is measured, where its device knows more than one execution. UserError where the device can't
    do what was said.
    """
    own, stored = search.base.training.execution, study.user_attrs.get("choice") if study else None
    said = "training.execution" in {*search.settings, *search.space()} or own != "eager"
    executions = EXECUTIONS[device.type]
    if said:
        choice = Choice(own, workers or 1)
    elif stored:
        begun, why = (stored["workers"], "as the study was begun") if len(executions) > 1 else (1, "")
        choice = Choice(stored["execution"], workers or begun, stored["taken"], why)
    elif len(executions) == 1 or (study and num_finished(study)):
        choice = Choice(own, workers or 1)
    else:
        ways, failed = measure_ways(search, data, device, executions)
        left, cores = search.trials, os.cpu_count() or 1
        choice = choose(ways, left, cores, _free_gib(device), workers, failed)
    if choice.execution != own:
        search = replace(search, settings={**search.settings, "training.execution": choice.execution})
    check_execution(search.base, device)
    return search, choice


def _free_gib(device: torch.device) -> float:
    """Memory of a GPU that nobody uses."""
    torch.cuda.empty_cache()
    return float(torch.cuda.mem_get_info(device)[0]) / 2**30


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
    choice: Choice | None = None  # of execution and workers


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
    choice: Choice | None = None,
) -> Forecast | None:
    """Measure the control and a few random recipes; None where no trial is left. `study` is what is stored so far.

    Time: the mean of the measured epochs, times the mean epochs of random recipes of the space (the search will come to
    prefer some, which isn't foreseen), and what a trial takes beside. Pruned: what the pruner does with trials whose
    scores are random and keep their order, which is what three live studies came to (studies/README.md). Other work on
    the machine changes all of it. `on_step` may raise to end it. Several `workers` share the work, on a CPU as far as
    there are cores, with one thread each, on a GPU as far as the `choice` found it free.
    """
    with _one_thread() if workers > 1 and device.type == "cpu" else contextlib.nullcontext():
        found = _forecast(search, data, device, study, on_step, workers, choice.taken if choice else 0.0)
    return replace(found, choice=choice) if found else None


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
    taken: float,
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
    each = max(1 / at_once, taken)  # of the time that one worker would take for all
    numbers = used * EPOCH_NUMBERS + work_s * MACHINE_NUMBERS_PER_S
    return Forecast(
        trials=left,
        seconds=start_s + work_s * each,
        unpruned_seconds=start_s + (total * epoch_s + left * end_s) * each,
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
            trained, ended = simulate(part, rule(search.pruner(), ""), workers, MIN_UNPRUNED_TRIALS)
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
