"""How fast a GPU trains here, in parts, the most wanted first: each in a process of its own, with a time limit.

All parts take eight minutes, nine with `--airbench`. A part yields rows, JSON each, and each is written at once. A row
that fails has an `error` and its `traceback`, and the part continues; a part that fails, dies or runs out of its time
keeps its rows and its stacks, and the next one starts.

On a GPU machine without network, which has Python 3.12, torch, a clone and torchvision's CIFAR-10 in DATA:

    # on a machine with a network; what the GPU machine has already can be left out
    pip download --no-deps --only-binary=:all: --python-version 3.12 --dest wheels -r needed.txt
    # on the GPU machine, in the clone
    python3 -m pip install --quiet --no-index --no-deps --target /tmp/site wheels/*.whl
    export PYTHONPATH=$PWD:/tmp/site PYTHONUNBUFFERED=1
    timeout 580 python3 -m pipeline bench-gpu --data-dir DATA --output gpu.json
    python3 -m pytest -k gpu tests/training tests/gpu
    python3 -m pipeline bench-gpu --data-dir DATA --output again.json --only 'attention,study'

`needed.txt` lists what the machine lacks of .constraints.txt; for most machines: mlflow, mlflow-skinny, mlflow-tracing,
optuna, pydantic, SQLAlchemy, and what those need.
"""

import contextlib
import faulthandler
import functools
import math
import multiprocessing
import multiprocessing.context
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch

from pipeline.benchmarks.networks import machine, measure_networks, peer_arguments, peer_speed, step_work
from pipeline.data.datasets import Split, default_image_size, load
from pipeline.data.prepare import TrainingData, prepare
from pipeline.errors import UserError
from pipeline.experiment import publish
from pipeline.recipe import Data, Recipe
from pipeline.registry.speed_runs import six_views, speed_run_data
from pipeline.search import run_study
from pipeline.search.forecast import Choice, decide, forecast
from pipeline.search.speed import Stopwatch, measure, measure_overhead, trial_seconds
from pipeline.search.storage import open_storage
from pipeline.search.study import Search, available, load_study
from pipeline.search.trial import StudyContext
from pipeline.tracking.tags import State
from pipeline.tracking.tracker import MlflowTracker, Tracker
from pipeline.training.loop import train

Row = dict[str, Any]

START = "spawn"  # of processes: a fork may not use a GPU that its parent has used
NETWORKS = ("improved", "plain")
COMPILED = ("attention", "improved")  # each takes half a minute to compile
# `attention` as published, and with widths that fill tensor cores.
WIDTHS: dict[str, dict[str, Any]] = {"": {}, " of 32 to 256": {"model.widths": (32, 64, 128, 256)}}
# What small networks are: `baseline` made wider, and `improved` made wider, with all of its augmentation.
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "0.3 M": ("baseline", {"model.widths": (32, 64)}),
    "2 M": ("improved", {"model.widths": (48, 96, 192), "model.hidden": 512}),
}
# The changes that studies/fast.py gives for its aims; the deeper ones have the networks and lengths of airbench95 and 96.
FAST: dict[str, dict[str, Any]] = {
    "94 %": {},
    "95 %": {"model.widths": (128, 384, 384), "training.epochs": 15, "optimizer.whitening_share": 0.2},
    "96 %": {
        "model.widths": (128, 384, 512),
        "model.depth": 3,
        "training.epochs": 40,
        "optimizer.whitening_share": 0.075,
        "augmentation.crop_padding": 4,
        "augmentation.erasing": 0.5,
    },
}
# A proposal, not measured yet: as the other systems' short recipes, at four times the batch and rate, with CutMix.
ATTENTION: dict[str, Any] = {
    "augmentation.rotation": 0,
    "augmentation.perspective": 0,
    "augmentation.brightness": 0,
    "augmentation.contrast": 0,
    "augmentation.saturation": 0,
    "augmentation.hue": 0,
    "augmentation.mixup": 0,
    "augmentation.cutmix": 0.25,
    "augmentation.horizontal_flip": "alternating",
    "model.dropout": 0.1,
    "optimizer.lr": 0.4,
    "optimizer.nesterov": True,
    "schedule.name": "one_cycle",
    "schedule.peak": 0.25,
    "training.batch_size": 512,
    "training.epochs": 60,
    "training.ema_decay": 0.998,
}
STUDY: dict[str, Any] = {"training.batch_size": 512, "training.epochs": 10}
STUDY_TRIALS = 100
STACKS_S = 0.5  # for a part that is out of time to write its stacks
TRIAL_S = 10.0  # of the trial whose share of tracking is measured


@dataclass(frozen=True)
class GpuBenchmark:
    """What is measured, and how long."""

    device: str = "cuda"
    dataset: str = "cifar10"
    data_dir: Path = Path("data")
    home: Path = Path("mlruns")  # the folder of the ledger of test evaluations
    peer: Path | None = None  # a script as `networks.against` takes
    airbench: Path | None = None  # airbench94_muon.py, or one that prints the same table
    seconds: float = 1.5  # of each measurement
    batch_sizes: tuple[int, ...] = (128, 512, 2000)
    executions: tuple[str, ...] = ("eager", "graphed", "compiled", "compiled_graphed")
    at_once: tuple[int, ...] = (1, 2, 4, 8)
    rounds: int = 3  # against the peer
    eager_runs: int = 3  # of `fast`
    fast_runs: Mapping[str, int] = field(default_factory=lambda: {"94 %": 10, "95 %": 3, "96 %": 2})
    airbench_runs: int = 10
    trials: int = 4
    changes: Mapping[str, Any] = field(default_factory=dict)  # of every recipe, as far as it has such fields

    def recipe(self, study: str, changes: Mapping[str, Any]) -> Recipe:
        """A study's base recipe with these fields changed, on this data set."""
        return load_study(study).base.changed({}, self.settings(changes))

    def settings(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """These fields, the data set's, and `self.changes`."""
        size = default_image_size(self.dataset)
        return {"data.dataset": self.dataset, "data.image_size": size, **changes, **self.changes}

    def data(self, recipe: Recipe) -> TrainingData:
        """Split as the recipe says, on the device."""
        return _prepared(recipe.data, self.data_dir, self.torch_device)

    @property
    def torch_device(self) -> torch.device:
        """The device, as torch names it."""
        return torch.device(self.device)


@functools.lru_cache(maxsize=1)
def _prepared(recipe: Data, data_dir: Path, device: torch.device) -> TrainingData:
    """Cached for all rows of a part: reading the data takes longer than most of them."""
    return prepare(load(recipe.dataset, recipe.image_size, data_dir), recipe, device)


def _attempt(what: str, measure_row: Callable[..., Row], *arguments: Any) -> Row:
    """A row; one with an `error` where it can't be measured, so that the others still are."""
    try:
        return {"what": what} | measure_row(*arguments)
    except Exception as error:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return {"what": what, "error": _message(error), "traceback": traceback.format_exc()}


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"


def _context() -> multiprocessing.context.SpawnContext:
    return cast("multiprocessing.context.SpawnContext", multiprocessing.get_context(START))


# --------------------------------------------------------------------------------------------------------------- parts


def networks(benchmark: GpuBenchmark) -> Iterator[Row]:
    """`improved` and `plain`, batch 128, as their studies train them: images/s, shares, and the ratio to a peer's script."""
    for name in NETWORKS:
        recipe = benchmark.recipe(name, {})
        data = benchmark.data(recipe)
        yield _attempt(f"{name}, eager", _network, benchmark, name, recipe, data)
        peers: list[float] = []
        ours: dict[str, list[float]] = {execution: [] for execution in benchmark.executions[:2]}
        for number in range(benchmark.rounds if benchmark.peer else 0):
            assert benchmark.peer
            arguments = peer_arguments(name, recipe, benchmark.data_dir, benchmark.torch_device)
            peers.append(peer_speed(benchmark.peer, arguments))
            for execution, speeds in ours.items():
                row = _attempt(f"{name}, {execution}, round {number + 1}", _speed, benchmark, recipe, data, execution)
                yield row | {"peer_images_per_second": peers[-1]}
                speeds.append(row.get("images_per_second", 0.0))
        for execution, speeds in ours.items():
            ratios = [our_speed / its_speed for our_speed, its_speed in zip(speeds, peers, strict=True) if our_speed]
            if ratios:
                ratio = {f.__name__: round(f(ratios), 2) for f in (min, statistics.median, max)}
                yield {"what": f"{name}, {execution}, by the peer's", "ratio": ratio}


def _network(benchmark: GpuBenchmark, name: str, recipe: Recipe, data: TrainingData) -> Row:
    return next(measure_networks([(name, recipe, data)], benchmark.torch_device, benchmark.seconds))


def executions(benchmark: GpuBenchmark) -> Iterator[Row]:
    """Each study's network by its base recipe, eager and graphed; then compiled, as far as time allows."""
    plain, compiled = benchmark.executions[:2], benchmark.executions[2:]
    for name, execution in [
        *((name, execution) for name in available() for execution in plain),
        *((name, execution) for name in COMPILED for execution in compiled),
    ]:
        recipe = benchmark.recipe(name, {})
        yield _attempt(f"{name}, {execution}", _speed, benchmark, recipe, benchmark.data(recipe), execution)


def batches(benchmark: GpuBenchmark) -> Iterator[Row]:
    """Two small networks and several batch sizes, eager and graphed."""
    for size, (study, changes) in SMALL.items():
        recipe = benchmark.recipe(study, changes)
        data = benchmark.data(recipe)
        for batch_size in benchmark.batch_sizes:
            changed = recipe.changed({"training.batch_size": batch_size})
            for execution in benchmark.executions[:2]:
                what = f"{size}, batch {batch_size}, {execution}"
                yield _attempt(what, _speed, benchmark, changed, data, execution)


def _speed(benchmark: GpuBenchmark, recipe: Recipe, data: TrainingData, execution: str) -> Row:
    """`first_step_s` is what it takes until the first step is sent: set-up, and compilation where there is one.

    `tflops` counts matrix products and convolutions, two operations for each multiply-add, and all of a step's time.
    """
    first: list[float] = []

    def on_step(epoch: int, step: int, steps: int) -> None:
        if not first:
            first.append(time.perf_counter() - began)

    began = time.perf_counter()
    executed = recipe.changed({"training.execution": execution})
    speed = measure(executed, data, benchmark.torch_device, benchmark.seconds, on_step)
    flop = step_work(executed, data, benchmark.torch_device).flop
    return {
        "images_per_second": round(speed.images_per_second, 1),
        "step_ms": round(1000 * sum(speed.step_s.values()), 3),
        "tflops": round(flop / sum(speed.step_s.values()) / 1e12, 4),
        "first_step_s": round(first[0], 2),
        "memory_gib": round(speed.memory_gib, 2),
    }


def at_once(benchmark: GpuBenchmark) -> Iterator[Row]:
    """Several equal trainings of `attention` at once, each in a process; `ratio` is to one eager one, in trials per hour."""
    context = _context()
    phases = [(execution, count) for execution in benchmark.executions[:2] for count in benchmark.at_once]
    barrier, results = context.Barrier(max(benchmark.at_once)), context.Queue()
    processes = [
        context.Process(target=_one_of_many, args=(benchmark, phases, index, barrier, results))
        for index in range(max(benchmark.at_once))
    ]
    for process in processes:
        process.start()
    alone = 0.0
    arrived: dict[int, list[Row]] = defaultdict(list)
    for number, (execution, count) in enumerate(phases):
        while len(arrived[number]) < count:
            phase, row = results.get()  # a result may be overtaken by one of the next phase
            arrived[phase].append(row)
        rows = arrived[number]
        what = f"attention, {execution}, {count} at once"
        if failed := [row for row in rows if "error" in row]:
            yield failed[0] | {"what": what}
            continue
        images_per_second = sum(row["images_per_second"] for row in rows)
        if (execution, count) == ("eager", 1):
            alone = images_per_second
        yield {
            "what": what,
            "images_per_second": round(images_per_second, 1),
            "ratio": round(images_per_second / alone, 2) if alone else None,
            "memory_gib": max(row["memory_gib"] for row in rows),
        }
    for process in processes:
        process.join()


def _one_of_many(
    benchmark: GpuBenchmark,
    phases: list[tuple[str, int]],
    index: int,
    barrier: threading.Barrier,
    results: "multiprocessing.Queue[tuple[int, Row]]",
) -> None:
    """Every phase begins when all processes are ready; those with an index of its count or more skip it."""
    torch.set_num_threads(1)
    recipe = benchmark.recipe("attention", {})
    data = benchmark.data(recipe)
    for number, (execution, count) in enumerate(phases):
        barrier.wait()
        if index < count:
            results.put((number, _attempt("", _speed, benchmark, recipe, data, execution)))


def fast(benchmark: GpuBenchmark) -> Iterator[Row]:
    """`fast`'s three aims by the speed runs' protocol, tracked; on CIFAR-10 scored on the test split, else on validation.

    `seconds` is what the lineage counts, training and the six views, and in addition our set-up and tracking, but not the
    loop's own evaluation; `trial_s` is the complete trial, scored and stored.
    """
    with tempfile.TemporaryDirectory() as folder:
        tracker = MlflowTracker(Path(folder))
        eager, graphed = benchmark.executions[:2]
        first, *others = benchmark.fast_runs
        cases = [(first, graphed, benchmark.fast_runs[first]), (first, eager, benchmark.eager_runs)]
        cases += [(aim, graphed, benchmark.fast_runs[aim]) for aim in others]
        cases += [(first, execution, benchmark.eager_runs) for execution in benchmark.executions[3:]]
        data, scored = _protocol(benchmark, f"bench-gpu, speed runs of {', '.join(benchmark.fast_runs)}")
        for aim, execution, count in cases:
            recipe = benchmark.recipe("fast", {**FAST[aim], "training.execution": execution})
            yield _attempt(
                f"{aim}, {execution}", _fast_runs, recipe, data, scored, tracker, count, benchmark.torch_device
            )
        tracker.flush(60)  # before its folder goes


def _protocol(benchmark: GpuBenchmark, reason: str) -> tuple[TrainingData, Split]:
    if benchmark.dataset == "cifar10":
        return speed_run_data(benchmark.data_dir, benchmark.torch_device, benchmark.home, reason)
    data = benchmark.data(benchmark.recipe("fast", {}))
    return data, data.validation


def _fast_runs(
    recipe: Recipe, data: TrainingData, scored: Split, tracker: Tracker, count: int, device: torch.device
) -> Row:
    runs = [_fast_run(recipe, data, scored, tracker, seed, device) for seed in range(count + 1)]
    del runs[0]  # the first warms up
    columns = {name: [run[name] for run in runs] for name in runs[0]}
    accuracies = columns["accuracy"]
    return {
        **{name: round(statistics.mean(values), 4) for name, values in columns.items()},
        "accuracy_deviation": round(statistics.stdev(accuracies), 4) if count > 1 else None,
        "n": count,
        "scored_on": "test split" if scored is not data.validation else "validation split",
        "runs": runs,
    }


def _fast_run(
    recipe: Recipe, data: TrainingData, scored: Split, tracker: Tracker, seed: int, device: torch.device
) -> Row:
    recipe, watch, began = recipe.changed({"training.seed": seed}), Stopwatch(device), time.perf_counter()
    with tracker.run(f"seed {seed}", recipe, data) as tracked:
        result = train(
            recipe, data, device, lambda report: tracked.log_metrics(report.metrics, report.epoch), on_part=watch
        )
        total, _ = watch.seconds()
        views_began = time.perf_counter()
        logits = six_views(result.network, scored.images, data.mean, data.std, recipe.training.precision)
        accuracy = (logits.argmax(1) == scored.labels).double().mean().item()
        views_s = time.perf_counter() - views_began
        publish(tracked, recipe, data, result)
        tracked.end(State.FINISHED)
    return {
        "accuracy": round(accuracy, 4),
        "seconds": round(sum(total.values()) - total["evaluation"] + views_s, 3),
        "of_that_tracking_s": round(total["tracking"], 3),
        "trial_s": round(time.perf_counter() - began, 3),
    }


def airbench(benchmark: GpuBenchmark) -> Iterator[Row]:
    """The original script, unchanged: it compiles, warms up with a run that isn't counted, and prints each run's time."""
    if not benchmark.airbench:
        return
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder) / "cifar10"
        data_dir.mkdir()
        (data_dir / "cifar-10-batches-py").symlink_to(benchmark.data_dir.resolve() / "cifar-10-batches-py")
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, str(benchmark.airbench.resolve())],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert process.stdout
        last_line, runs = "it printed nothing", []
        with process, contextlib.ExitStack() as stack:
            stack.callback(process.kill)
            for line in process.stdout:
                last_line = line.strip() or last_line
                if row := re.search(r"\|\s+eval\s+\|.*\|\s*([\d.]+)\s*\|\s*([\d.]+)\s*\|\s*$", line):
                    runs.append((float(row[1]), float(row[2])))
                if len(runs) == 1 and row:
                    warm_up_s = time.perf_counter() - began
                if len(runs) > benchmark.airbench_runs:
                    break
    if len(runs) < 2:
        yield {"what": benchmark.airbench.name, "error": f"no run was completed: {last_line}"}
        return
    accuracies, seconds = zip(*runs[1:], strict=True)
    yield {
        "what": benchmark.airbench.name,
        "accuracy": round(statistics.mean(accuracies), 4),
        "seconds": round(statistics.mean(seconds), 4),
        "n": len(seconds),
        "warm_up_s": round(warm_up_s, 1),
    }


def attention(benchmark: GpuBenchmark) -> Iterator[Row]:
    """`attention`'s speed with two sets of widths, and its validation accuracy by a short recipe, published as 95.30 %."""
    for batch_size in (128, 512):
        for widths, changes in WIDTHS.items():
            recipe = benchmark.recipe("attention", {**changes, "training.batch_size": batch_size})
            for execution in benchmark.executions[:2]:
                what = f"attention{widths}, batch {batch_size}, {execution}"
                yield _attempt(what, _speed, benchmark, recipe, benchmark.data(recipe), execution)
    for execution in (benchmark.executions[1], benchmark.executions[0]):
        recipe = benchmark.recipe("attention", {**ATTENTION, "training.execution": execution})
        row = _attempt(
            f"attention's short recipe, {execution}", _attention, recipe, benchmark.data(recipe), benchmark.torch_device
        )
        yield row
        if "error" not in row:
            return


def _attention(recipe: Recipe, data: TrainingData, device: torch.device) -> Row:
    result = train(recipe, data, device)
    return {
        "accuracy": result.history[-1].metrics["val/accuracy"],
        "seconds": round(result.seconds, 2),
        "epochs": recipe.training.epochs,
        "by_epoch": [round(report.metrics["val/accuracy"], 4) for report in result.history],
    }


def study(benchmark: GpuBenchmark) -> Iterator[Row]:
    """A study of `attention` with the execution that it chooses: a forecast of 100 trials, a few of them, tracking's share."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        tracker = MlflowTracker(home)
        search = Search("attention", load_study("attention"), benchmark.settings(STUDY), 1, STUDY_TRIALS, None)
        data = benchmark.data(search.base)
        began = time.perf_counter()
        search, choice = decide(search, data, benchmark.torch_device, None)
        execution = choice.execution
        yield {"what": f"choice: {execution}", "workers": choice.workers, "why": choice.why, "seconds": _since(began)}
        yield _attempt(
            f"forecast of {STUDY_TRIALS} trials, {execution}", _forecast, search, choice, data, benchmark.torch_device
        )
        short = replace(search, trials=benchmark.trials)
        yield _attempt(
            f"{benchmark.trials} trials, {execution}", _trials, short, data, benchmark.torch_device, tracker, home
        )
        yield _attempt(f"tracking, {execution}", _tracking, search.base, data, benchmark, tracker)
        tracker.flush(60)


def _since(began: float) -> float:
    return round(time.perf_counter() - began, 2)


def _forecast(search: Search, choice: Choice, data: TrainingData, device: torch.device) -> Row:
    made = forecast(search, data, device, None, choice)
    assert made
    return {"seconds": round(made.seconds, 1), "epoch_s": round(made.epoch_s, 3), "pruned": round(made.pruned, 1)}


def _tracking(recipe: Recipe, data: TrainingData, benchmark: GpuBenchmark, tracker: Tracker) -> Row:
    speed = measure(recipe, data, benchmark.torch_device, benchmark.seconds)
    measure_overhead(recipe, data, benchmark.torch_device, speed, tracker)  # a process's first run takes seconds more
    overhead = measure_overhead(recipe, data, benchmark.torch_device, speed, tracker)
    epochs = math.ceil(TRIAL_S / speed.epoch_s)
    seconds = trial_seconds(recipe.changed({"training.epochs": epochs}), speed, overhead)
    total = sum(seconds.values())
    return {"share": round(seconds["tracking"] / total, 4), "trial_s": round(total, 2), "epochs": epochs}


def _trials(search: Search, data: TrainingData, device: torch.device, tracker: MlflowTracker, home: Path) -> Row:
    began = time.perf_counter()
    context = StudyContext(
        search=search, data=data, device=device, storage=open_storage(home), tracker=tracker, observer=_Silent()
    )
    result = run_study.run_study(context)
    seconds = time.perf_counter() - began
    return {"seconds": round(seconds, 2), "trial_s": round(seconds / search.trials, 2), "best": result.best_value}


class _Silent:
    """Observes a study and prints nothing (`search.trial.Observer`)."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: None


# Part -> what measures it, and its time limit in seconds with the start of its process; the most wanted first.
PARTS: dict[str, tuple[Callable[[GpuBenchmark], Iterator[Row]], float]] = {
    "executions": (executions, 85),
    "attention": (attention, 90),
    "fast": (fast, 90),
    "at once": (at_once, 55),
    "study": (study, 55),
    "batches": (batches, 40),
    "networks": (networks, 45),
    "airbench": (airbench, 65),
}


# ------------------------------------------------------------------------------------------------------------- running


def parts(only: Iterable[str]) -> list[str]:
    """These names of parts, or all where there are none; UserError for an unknown name."""
    names = list(only) or list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        raise UserError(f"`--only {unknown[0]}`", f"not one of {', '.join(PARTS)}")
    return names


def run_parts(
    benchmark: GpuBenchmark,
    only: Iterable[str],
    on_row: Callable[[str, Row], None],
    write: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Measure these parts, or all where there are none; the report, which is also given to `write` after each row.

    `{"machine": ..., "parts": {name: {"state", "seconds", "reason", "traceback", "rows"}}}`; a state is "running", "done",
    "failed" or "out of time". UserError for an unknown name.
    """
    names = parts(only)
    report: dict[str, Any] = {"machine": machine(benchmark.torch_device), "parts": {}}
    for name in names:
        part: dict[str, Any] = {"state": "running", "seconds": 0.0, "reason": "", "traceback": "", "rows": []}
        report["parts"][name] = part
        for row in _run_part(name, benchmark, PARTS[name][1], part):
            on_row(name, row)
            write(report)
        write(report)
    return report


def failures(report: Mapping[str, Any]) -> list[str]:
    """A line for each part that isn't done, and for each row that failed."""
    lines = []
    for name, part in report["parts"].items():
        lines += [f"{name}: {row['what']}: {row['error']}" for row in part["rows"] if "error" in row]
        if part["state"] != "done":
            lines.append(f"{name}: {part['state']} after {part['seconds']} s: {part['reason']}")
    return lines


def _run_part(name: str, benchmark: GpuBenchmark, limit_s: float, part: dict[str, Any]) -> Iterator[Row]:
    """The part's rows as they arrive; they, and how it ended, are written into `part`."""
    # The part runs in a process group of its own and sends its rows through a pipe. At the end of its time it is asked by
    # SIGUSR1 to write its stacks, as it may hang in a GPU call; then the group is killed, with whatever it started.
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("r", errors="replace") as stacks:
        process = context.Process(target=_measure_part, args=(name, benchmark, stacks.name, sender))
        began = time.monotonic()
        process.start()
        assert process.pid
        sender.close()
        try:
            while receiver.poll(max(0.0, limit_s - (time.monotonic() - began))):
                try:
                    kind, value = receiver.recv()
                except EOFError:
                    process.join()
                    part |= {"state": "failed", "reason": f"its process died with exit code {process.exitcode}"}
                    break
                if kind == "row":
                    part["rows"].append(value)
                    yield value
                else:
                    part |= value | {"state": kind}
                    break
            else:
                part |= {"state": "out of time", "reason": f"its limit is {limit_s:g} s"}
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGUSR1)
                process.join(STACKS_S)
        finally:
            with contextlib.suppress(ProcessLookupError):  # it may not lead a group yet
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
            part["seconds"] = round(time.monotonic() - began, 1)
            if part["state"] != "done":
                part["traceback"] = part["traceback"] or stacks.read()


def _measure_part(name: str, benchmark: GpuBenchmark, stacks: str, sender: Connection) -> None:
    """In the part's own process, which leads a group of its own; writes its stacks where it crashes or gets SIGUSR1."""
    os.setsid()
    with open(stacks, "w") as file:
        faulthandler.enable(file)
        faulthandler.register(signal.SIGUSR1, file)
        try:
            for row in PARTS[name][0](benchmark):
                sender.send(("row", row))
            sender.send(("done", {"reason": ""}))
        except Exception as error:
            sender.send(("failed", {"reason": _message(error), "traceback": traceback.format_exc()}))
        finally:
            faulthandler.disable()
            faulthandler.unregister(signal.SIGUSR1)
