"""How a study's trials are executed: the way its steps run, by how many workers, in which precision."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import optuna
import torch

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError, first_line
from pipeline.evaluation.logits import bf16_supported
from pipeline.search.search import Search
from pipeline.search.speed import (
    CONTROL_S,
    TRACKING_S,
    WORKER_START_S,
    RecipeFails,
    fastest_precision,
    measure_mean,
    measure_overhead,
    trial_seconds,
)
from pipeline.search.stored_study import num_finished
from pipeline.search.study_attributes import Choice, StudyAttributes
from pipeline.tracking.tracker import NullTracker
from pipeline.training.execution import check_execution
from pipeline.training.placement import check_workers, fair_workers, gpus_of

# What may be chosen without being asked for. A graph replays the kernels of eager execution, while a compiled step rounds
# differently and draws other numbers for its dropout: scores would depend on a stopwatch.
EXECUTIONS = {"cpu": ("eager",), "cuda": ("eager", "graphed")}
WORTHWHILE = 0.8  # of a study's time: a less simple way has to save a fifth of it
MAX_DEFAULT_WORKERS = 4  # each takes a core and gigabytes, and the search knows less when it asks
CONTEXT_GIB = 1.0  # of a GPU, which a process takes before its first tensor


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
            speed = measure_mean(recipe, data, device, CONTROL_S, on_step)
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


def _check_usable(device: torch.device, failed: str) -> None:
    """A capture that broke off may leave the generator of random numbers in it."""
    try:
        torch.rand((), device=device).item()
    except RuntimeError:
        raise UserError(str(device), failed, "`--set training.execution=eager` trains without it") from None


def choose_execution(
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
    bounds = search.study.constraints
    check_workers(bounds, workers or 1, device)
    own, stored = search.base.training.execution, StudyAttributes.of(study).choice if study else None
    is_set = "training.execution" in search.settings or search.values("training.execution") or own != "eager"
    executions = EXECUTIONS[device.type]
    if is_set:
        choice = Choice(own, workers or 1)
    elif stored:
        default, why = (stored.workers, "as the study started") if len(executions) > 1 else (1, "")
        choice = Choice(stored.execution, workers or fair_workers(bounds, default, device), stored.taken, why)
    elif len(executions) == 1 or (study and num_finished(study)):
        choice = Choice(own, workers or 1)
    else:
        ways, failed = measure_ways(search, data, device, executions)
        cores, gpus = fair_workers(bounds, os.cpu_count() or 1, device), max(1, len(gpus_of(device)))
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
