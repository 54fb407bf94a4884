"""What a study will cost: how its steps are executed, a forecast from a few measured steps, and what it really took."""

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
from pipeline.evaluation.logits import bf16_supported
from pipeline.experiment import DIVERGED, why_failed
from pipeline.recipe import Recipe
from pipeline.search.search import Search
from pipeline.search.short_trials import short_epochs, simulate
from pipeline.search.speed import Speed, fastest_precision, measure_mean, measure_overhead, trial_seconds
from pipeline.search.storage import num_finished
from pipeline.search.study_attributes import Choice, StudyAttributes
from pipeline.search.trial_attributes import TrialAttributes, is_feasible
from pipeline.tracking.sqlite import checkpoint
from pipeline.tracking.tracker import NullTracker, Run
from pipeline.training.execution import check_execution
from pipeline.training.loop import Diverged
from pipeline.training.placement import gpus_of, threads_of_each

CONTROL_S = 1.5  # of measuring the control; on slow networks two short epochs take longer
NUM_OTHER_RECIPES = 3  # random ones, while all measuring takes less than MEASURING_FRACTION of the forecast time
MEASURING_FRACTION = 0.02
NUM_DRAWN_RECIPES = 200  # random ones whose epochs are averaged
# Not measured each time, as that would leave a run behind. Measured on 2 CPU cores: 0.05 to 0.1 s a trial besides the
# epochs' metrics; 326 and 330 bytes a metric in databases of 12,816 and 7,243, of which the system monitor wrote 1.5 a
# second.
TRACKING_S = 0.1
WORKER_START_S = 6.0  # from a process's start until its first trial; measured: 6.0 s of processor time with digits
METRIC_BYTES = 330
METRICS_PER_EPOCH = 9
SYSTEM_METRICS_PER_S = 1.5
NUM_SIMULATED_TRIALS, NUM_SIMULATED_STUDIES = 100, 10  # at most

# What may be chosen without being asked for. A graph replays the kernels of eager execution, while a compiled step rounds
# differently and draws other numbers for its dropout: scores would depend on a stopwatch.
EXECUTIONS = {"cpu": ("eager",), "cuda": ("eager", "graphed")}
WORTHWHILE = 0.8  # of a study's time: a less simple way has to save a fifth of it
MAX_DEFAULT_WORKERS = 4  # each takes a core and gigabytes, and the search knows less when it asks
CONTEXT_GIB = 1.0  # of a GPU, which a process takes before its first tensor


class RecipeFails(UserError):
    """A recipe whose trial would fail: it needs too much memory, or diverges."""


@dataclass(frozen=True)
class Way:
    """What a complete trial of the control takes by one execution of its steps; times in seconds."""

    execution: str
    training_s: float  # with the evaluations: the device is in use
    tracking_s: float  # the run's start and end, figures, files: the device is free
    memory_gib: float  # of a GPU


def choose(
    ways: Sequence[Way],
    trials: int,
    cores: int,
    free_gib: float,
    workers: int | None = None,
    failed: str = "",
    gpus: int = 1,
) -> Choice:
    """The simplest way, and number of workers (`workers`, or from 1 on), that is hardly slower than the fastest one.

    One device completes no more than one trial in the shortest `training_s` of all `ways`, however many workers there
    are: a graph leaves it no pause, and processes take turns. A worker's memory may be twice the control's. Of several
    equal `gpus`, which workers get in turn, each has `free_gib`. At most 4 workers, or as many as GPUs.
    """
    least_s = min(way.training_s for way in ways)
    memory_gib = 2 * max(way.memory_gib for way in ways) + CONTEXT_GIB
    max_workers = max(1, min(trials, cores, max(MAX_DEFAULT_WORKERS, gpus), gpus * int(free_gib / memory_gib)))
    counts = [workers] if workers else range(1, max_workers + 1)

    def seconds(way: Way, count: int) -> float:
        trial_s = way.training_s + way.tracking_s
        return WORKER_START_S + trials * max(trial_s / count, least_s / min(gpus, count))

    options = [(way, count) for count in counts for way in ways]  # the simplest first
    fastest_s = min(seconds(*option) for option in options)
    way, count = next(option for option in options if WORTHWHILE * seconds(*option) <= fastest_s)
    times = [f"{way.execution} {way.training_s + way.tracking_s:.3g} s" for way in ways] + ([failed] if failed else [])
    why = f"a complete trial takes {', '.join(times)}; the device is free for {way.tracking_s:.2g} s of it"
    return Choice(way.execution, count, least_s / (way.training_s + way.tracking_s) / gpus, why)


def measure_ways(
    search: Search,
    data: TrainingData,
    device: torch.device,
    executions: Sequence[str],
    on_step: Callable[[int, int, int], None] = lambda epoch, step, steps: None,
) -> tuple[list[Way], str]:
    """Measure the control, a few seconds by each execution; with the errors of those after the first that fail here.

    UserError where such an error leaves the device unusable for this process.
    """
    ways: list[Way] = []
    failed = []
    overhead = None
    for execution in executions:
        recipe = search.base.changed({"training.execution": execution})
        try:
            speed = _measured(recipe, data, device, CONTROL_S, on_step)
        except (RuntimeError, RecipeFails) as error:  # as torch's are, of a capture
            if not ways:
                raise
            failed.append(f"{execution} fails ({first_line(error)})")
            _check_usable(device, failed[-1])
            continue
        if overhead is None:
            for _ in range(2):  # a process's first figures take seconds more
                overhead = measure_overhead(recipe, data, device, speed, NullTracker())
        assert overhead
        seconds = trial_seconds(recipe, speed, overhead)
        tracking_s = seconds.pop("tracking") + TRACKING_S
        ways.append(Way(execution, sum(seconds.values()), tracking_s, speed.memory_gib))
    return ways, "; ".join(failed)


def _measured(
    recipe: Recipe, data: TrainingData, device: torch.device, seconds: float, on_step: Callable[[int, int, int], None]
) -> Speed:
    """As `measure_mean`; RecipeFails where a trial of the recipe would."""
    try:
        return measure_mean(recipe, data, device, seconds, on_step)
    except (Diverged, MemoryError, RuntimeError) as error:
        if not (reason := why_failed(error)):
            raise
    if device.type == "cuda":
        torch.cuda.empty_cache()
    size = f"batches of {recipe.training.batch_size} and images of {recipe.data.image_size} pixels"
    remedy = "" if reason.startswith(DIVERGED) else "smaller ones take less memory"
    raise RecipeFails(f"{recipe.model.network} with {size}", reason.splitlines()[0], remedy)


def _check_usable(device: torch.device, failed: str) -> None:
    """A capture that broke off may leave the generator of random numbers in it."""
    try:
        torch.rand((), device=device).item()
    except RuntimeError:
        raise UserError(str(device), failed, "`--set training.execution=eager` trains without it") from None


def decide(
    search: Search,
    data: TrainingData,
    device: torch.device,
    study: optuna.Study | None,
    workers: int | None = None,
) -> tuple[Search, Choice]:
    """The search with its `training.execution`, and how many workers it gets. `study` is what is stored so far.

    What the command or the study's module sets comes first; then what earlier commands used for the study, so that its
    trials can be compared; a new study is measured, where its device knows more than one execution. UserError where the
    device can't do what was set.
    """
    own, stored = search.base.training.execution, StudyAttributes.of(study).choice if study else None
    is_set = "training.execution" in search.settings or search.values("training.execution") or own != "eager"
    executions = EXECUTIONS[device.type]
    if is_set:
        choice = Choice(own, workers or 1)
    elif stored:
        default, why = (stored.workers, "as the study started") if len(executions) > 1 else (1, "")
        choice = Choice(stored.execution, workers or default, stored.taken, why)
    elif len(executions) == 1 or (study and num_finished(study)):
        choice = Choice(own, workers or 1)
    else:
        ways, failed = measure_ways(search, data, device, executions)
        cores, gpus = os.cpu_count() or 1, max(1, len(gpus_of(device)))
        choice = choose(ways, search.trials, cores, _free_gib(device), workers, failed, gpus)
    if choice.execution != own:
        search = replace(search, settings={**search.settings, "training.execution": choice.execution})
    search, choice = _with_precision(search, choice, len(data.classes), device, study)
    check_execution(search.base, device)
    return search, choice


def _with_precision(
    search: Search, choice: Choice, num_classes: int, device: torch.device, study: optuna.Study | None
) -> tuple[Search, Choice]:
    """With the precision that `auto` stands for in this study, where that depends on the network: those of timm, on a CPU.

    A study that began keeps what it began with, as its scores would depend on a stopwatch otherwise.
    """
    stored = StudyAttributes.of(study).choice if study else None
    precision = stored.precision if stored else ""
    is_auto = search.base.training.precision == "auto" and not search.values("training.precision")
    if not is_auto or search.base.model.network != "timm" or (study and num_finished(study) and not precision):
        return search, choice
    if not precision and device.type == "cpu" and bf16_supported(device):
        precision = fastest_precision(search.base, num_classes)
    return replace(search, precision=precision), replace(choice, precision=precision)


def _free_gib(device: torch.device) -> float:
    """Memory of a GPU that no process uses."""
    torch.cuda.empty_cache()
    return float(torch.cuda.mem_get_info(device)[0]) / 2**30


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
    counter, on_cpu, start = _FileCounter(), device.type == "cpu", time.perf_counter()
    with _threads(threads_of_each(choice.workers)) if on_cpu else contextlib.nullcontext():
        control = search.base
        speeds = [_measured(control, data, device, CONTROL_S, on_step)]
        overhead = measure_overhead(control, data, device, speeds[0], counter)
        trial_s = sum(trial_seconds(control, speeds[0], overhead).values()) + TRACKING_S
        for recipe in _random_recipes(search, NUM_OTHER_RECIPES):
            if time.perf_counter() - start > MEASURING_FRACTION * min(total_s, trial_s * trials):
                break
            with contextlib.suppress(RecipeFails):  # as a trial it fails, and the study goes on
                speeds.append(_measured(recipe, data, device, CONTROL_S / 3, on_step))
    return Costs(
        epoch_s=statistics.mean(speed.epoch_s for speed in speeds) + overhead.epoch_s,
        end_s=trial_s - control.training.epochs * (speeds[0].epoch_s + overhead.epoch_s),
        start_s=WORKER_START_S if choice.workers > 1 or not on_cpu else 0.0,
        parallel=min(choice.workers, os.cpu_count() or 1) if on_cpu else choice.workers,
        taken=choice.taken,
        file_bytes=counter.bytes,
        memory_gib=None if on_cpu else max(speed.memory_gib for speed in speeds),
        measured=len(speeds),
    )


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


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
    num_metrics = used_epochs * METRICS_PER_EPOCH + work_s * SYSTEM_METRICS_PER_S
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


class _FileCounter(NullTracker):
    """Counts the bytes of the files that a run is given, and keeps none."""

    bytes = 0

    @contextlib.contextmanager
    def run(self, *arguments: Any, **options: Any) -> Iterator[Run]:
        """See Tracker."""
        with super().run(*arguments, **options) as run:
            run.log_files = self._count  # type: ignore[method-assign]
            yield run

    def _count(self, folder: Path) -> None:
        self.bytes += sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
