"""What a GPU is worth here, in parts, the most wanted first: each in a process of its own, with a limit of time.

All are done in eight minutes, and in nine with AIRBENCH=. A part yields rows, JSON each, and each is written as soon as it is
there. A row that fails carries an `error` and its `traceback`, and the part goes on; a part that fails, dies or runs out of
its time keeps the rows it had and tells where it was, and the next one starts.

On a GPU machine without network, which has Python 3.12 and torch, beside a clone and torchvision's CIFAR-10 in DATA:

    # where there is a network; what the machine has already can be left out
    pip download --no-deps --only-binary=:all: --python-version 3.12 --dest wheels -r needed.txt
    # there, in the clone
    python3 -m pip install --quiet --no-index --no-deps --target /tmp/site wheels/*.whl
    export PYTHONPATH=$PWD:/tmp/site PYTHONUNBUFFERED=1
    timeout 580 python3 -m pipeline bench-gpu --data-dir DATA --output gpu.json
    python3 -m pytest -k gpu tests/training tests/gpu
    python3 -m pipeline bench-gpu --data-dir DATA --output again.json --only 'attention,study'

`needed.txt` is what of .constraints.txt the machine lacks; for most: mlflow, mlflow-skinny, mlflow-tracing, optuna, pydantic,
SQLAlchemy, and what those need.
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

from pipeline.benchmarks.networks import benchmark, machine, peer_speed, peer_words, step_work
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
# `attention` as published, and with widths that tensor cores take whole.
WIDTHS: dict[str, dict[str, Any]] = {"": {}, " of 32 to 256": {"model.widths": (32, 64, 128, 256)}}
# What small networks are: `baseline` made wider, and `improved` made wider, with all of its augmentation.
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "0.3 M": ("baseline", {"model.widths": (32, 64)}),
    "2 M": ("improved", {"model.widths": (48, 96, 192), "model.hidden": 512}),
}
# What studies/fast.py says of its aims; the deeper ones have the networks and lengths of airbench95 and airbench96.
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
# A proposal, not measured yet: what made the other systems' short recipes, at four times the batch and rate, with CutMix.
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
STACKS_S = 0.5  # for a part that is out of time to write where it is
TRIAL_S = 10.0  # the trial whose share of tracking is asked for


@dataclass(frozen=True)
class GpuBenchmark:
    """What is measured, and how long."""

    device: str = "cuda"
    dataset: str = "cifar10"
    data_dir: Path = Path("data")
    home: Path = Path("mlruns")  # where looks at the test split are noted
    peer: Path | None = None  # a script as `bench.against` takes
    airbench: Path | None = None  # airbench94_muon.py, or one that prints the same table
    seconds: float = 1.5  # of each measurement
    batch_sizes: tuple[int, ...] = (128, 512, 2000)
    executions: tuple[str, ...] = ("eager", "graphed", "compiled", "compiled_graphed")
    at_once: tuple[int, ...] = (1, 2, 4, 8)
    rounds: int = 3  # beside the peer
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
        return _prepared(recipe.data, self.data_dir, self.where)

    @property
    def where(self) -> torch.device:
        """The device."""
        return torch.device(self.device)


@functools.lru_cache(maxsize=1)
def _prepared(wanted: Data, data_dir: Path, device: torch.device) -> TrainingData:
    """Once for all rows of a part: reading it takes longer than most of them."""
    return prepare(load(wanted.dataset, wanted.image_size, data_dir), wanted, device)


def _attempt(what: str, measured: Callable[..., Row], *arguments: Any) -> Row:
    """A row; what goes wrong with it doesn't keep the others from being measured."""
    try:
        return {"what": what} | measured(*arguments)
    except Exception as error:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return {"what": what, "error": _told(error), "traceback": traceback.format_exc()}


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"


def _context() -> multiprocessing.context.SpawnContext:
    return cast("multiprocessing.context.SpawnContext", multiprocessing.get_context(START))


# --------------------------------------------------------------------------------------------------------------- parts


def networks(bench: GpuBenchmark) -> Iterator[Row]:
    """`improved` and `plain`, batch 128, as their studies train them: images/s, shares, and beside the peer's script."""
    for name in NETWORKS:
        recipe = bench.recipe(name, {})
        data = bench.data(recipe)
        yield _attempt(f"{name}, eager", _network, bench, name, recipe, data)
        peers: list[float] = []
        ours: dict[str, list[float]] = {execution: [] for execution in bench.executions[:2]}
        for number in range(bench.rounds if bench.peer else 0):
            assert bench.peer
            words = peer_words(name, recipe, bench.data_dir, bench.where)
            peers.append(peer_speed(bench.peer, words))
            for execution, speeds in ours.items():
                row = _attempt(f"{name}, {execution}, round {number + 1}", _speed, bench, recipe, data, execution)
                yield row | {"peer_images_per_second": peers[-1]}
                speeds.append(row.get("images_per_second", 0.0))
        for execution, speeds in ours.items():
            ratios = [mine / theirs for mine, theirs in zip(speeds, peers, strict=True) if mine]
            if ratios:
                ratio = {f.__name__: round(f(ratios), 2) for f in (min, statistics.median, max)}
                yield {"what": f"{name}, {execution}, by the peer's", "ratio": ratio}


def _network(bench: GpuBenchmark, name: str, recipe: Recipe, data: TrainingData) -> Row:
    return next(benchmark([(name, recipe, data)], bench.where, bench.seconds))


def executions(bench: GpuBenchmark) -> Iterator[Row]:
    """Each study's network by its base recipe, eager and graphed; then what is compiled, as far as there is time."""
    plain, compiled = bench.executions[:2], bench.executions[2:]
    for name, execution in [
        *((name, execution) for name in available() for execution in plain),
        *((name, execution) for name in COMPILED for execution in compiled),
    ]:
        recipe = bench.recipe(name, {})
        yield _attempt(f"{name}, {execution}", _speed, bench, recipe, bench.data(recipe), execution)


def batches(bench: GpuBenchmark) -> Iterator[Row]:
    """Two small networks and several batch sizes, eager and graphed."""
    for size, (study, changes) in SMALL.items():
        recipe = bench.recipe(study, changes)
        data = bench.data(recipe)
        for batch_size in bench.batch_sizes:
            changed = recipe.changed({"training.batch_size": batch_size})
            for execution in bench.executions[:2]:
                what = f"{size}, batch {batch_size}, {execution}"
                yield _attempt(what, _speed, bench, changed, data, execution)


def _speed(bench: GpuBenchmark, recipe: Recipe, data: TrainingData, execution: str) -> Row:
    """`first_step_s` is what it takes until the first step is sent: set-up, and compilation where there is one.

    `tflops` counts matrix products and convolutions, two operations for each multiply-add, and all of a step's time.
    """
    first: list[float] = []

    def on_step(epoch: int, step: int, steps: int) -> None:
        if not first:
            first.append(time.perf_counter() - began)

    began = time.perf_counter()
    executed = recipe.changed({"training.execution": execution})
    speed = measure(executed, data, bench.where, bench.seconds, on_step)
    flop = step_work(executed, data, bench.where).flop
    return {
        "images_per_second": round(speed.images_per_second, 1),
        "step_ms": round(1000 * sum(speed.step_s.values()), 3),
        "tflops": round(flop / sum(speed.step_s.values()) / 1e12, 4),
        "first_step_s": round(first[0], 2),
        "memory_gib": round(speed.memory_gib, 2),
    }


def at_once(bench: GpuBenchmark) -> Iterator[Row]:
    """Several equal trainings of `attention` at once, each in a process; `ratio` is to one eager one, in trials per hour."""
    context = _context()
    phases = [(execution, count) for execution in bench.executions[:2] for count in bench.at_once]
    barrier, results = context.Barrier(max(bench.at_once)), context.Queue()
    processes = [
        context.Process(target=_one_of_many, args=(bench, phases, index, barrier, results))
        for index in range(max(bench.at_once))
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
        batch_writes = sum(row["images_per_second"] for row in rows)
        if (execution, count) == ("eager", 1):
            alone = batch_writes
        yield {
            "what": what,
            "images_per_second": round(batch_writes, 1),
            "ratio": round(batch_writes / alone, 2) if alone else None,
            "memory_gib": max(row["memory_gib"] for row in rows),
        }
    for process in processes:
        process.join()


def _one_of_many(
    bench: GpuBenchmark,
    phases: list[tuple[str, int]],
    index: int,
    barrier: threading.Barrier,
    results: "multiprocessing.Queue[tuple[int, Row]]",
) -> None:
    """Every phase begins when all are ready for it; those with an index from its count on leave it out."""
    torch.set_num_threads(1)
    recipe = bench.recipe("attention", {})
    data = bench.data(recipe)
    for number, (execution, count) in enumerate(phases):
        barrier.wait()
        if index < count:
            results.put((number, _attempt("", _speed, bench, recipe, data, execution)))


def fast(bench: GpuBenchmark) -> Iterator[Row]:
    """`fast`'s three aims by the speed runs' protocol, with tracking on; without CIFAR-10 the validation split judges.

    `seconds` is what the lineage counts, training and the six views, and besides our set-up and tracking, but not the
    loop's own evaluation; `trial_s` is the whole trial, scored and stored.
    """
    with tempfile.TemporaryDirectory() as folder:
        tracker = MlflowTracker(Path(folder))
        eager, graphed = bench.executions[:2]
        first, *others = bench.fast_runs
        cases = [(first, graphed, bench.fast_runs[first]), (first, eager, bench.eager_runs)]
        cases += [(aim, graphed, bench.fast_runs[aim]) for aim in others]
        cases += [(first, execution, bench.eager_runs) for execution in bench.executions[3:]]
        data, judge = _protocol(bench, f"bench-gpu, speed runs of {', '.join(bench.fast_runs)}")
        for aim, execution, count in cases:
            recipe = bench.recipe("fast", {**FAST[aim], "training.execution": execution})
            yield _attempt(f"{aim}, {execution}", _fast_runs, recipe, data, judge, tracker, count, bench.where)
        tracker.flush(60)  # before its folder goes


def _protocol(bench: GpuBenchmark, reason: str) -> tuple[TrainingData, Split]:
    if bench.dataset == "cifar10":
        return speed_run_data(bench.data_dir, bench.where, bench.home, reason)
    data = bench.data(bench.recipe("fast", {}))
    return data, data.validation


def _fast_runs(
    recipe: Recipe, data: TrainingData, judge: Split, tracker: Tracker, count: int, device: torch.device
) -> Row:
    runs = [_fast_run(recipe, data, judge, tracker, seed, device) for seed in range(count + 1)][
        1:
    ]  # the first warms up
    columns = {name: [run[name] for run in runs] for name in runs[0]}
    accuracies = columns["accuracy"]
    return {
        **{name: round(statistics.mean(values), 4) for name, values in columns.items()},
        "accuracy_deviation": round(statistics.stdev(accuracies), 4) if count > 1 else None,
        "n": count,
        "judged_by": "test split" if judge is not data.validation else "validation split",
        "runs": runs,
    }


def _fast_run(
    recipe: Recipe, data: TrainingData, judge: Split, tracker: Tracker, seed: int, device: torch.device
) -> Row:
    recipe, watch, began = recipe.changed({"training.seed": seed}), Stopwatch(device), time.perf_counter()
    with tracker.run(f"seed {seed}", recipe, data) as tracked:
        result = train(
            recipe, data, device, lambda report: tracked.log_metrics(report.metrics, report.epoch), on_part=watch
        )
        total, _ = watch.seconds()
        views_began = time.perf_counter()
        logits = six_views(result.network, judge.images, data.mean, data.std, recipe.training.precision)
        accuracy = (logits.argmax(1) == judge.labels).double().mean().item()
        views_s = time.perf_counter() - views_began
        publish(tracked, recipe, data, result)
        tracked.end(State.FINISHED)
    return {
        "accuracy": round(accuracy, 4),
        "seconds": round(sum(total.values()) - total["evaluation"] + views_s, 3),
        "of_that_tracking_s": round(total["tracking"], 3),
        "trial_s": round(time.perf_counter() - began, 3),
    }


def airbench(bench: GpuBenchmark) -> Iterator[Row]:
    """The original script, as it is: it compiles, warms up with a run that isn't counted, and says each run's time."""
    if not bench.airbench:
        return
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder) / "cifar10"
        there.mkdir()
        (there / "cifar-10-batches-py").symlink_to(bench.data_dir.resolve() / "cifar-10-batches-py")
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, str(bench.airbench.resolve())],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert process.stdout
        said, runs = "it said nothing", []
        with process, contextlib.ExitStack() as stack:
            stack.callback(process.kill)
            for line in process.stdout:
                said = line.strip() or said
                if found := re.search(r"\|\s+eval\s+\|.*\|\s*([\d.]+)\s*\|\s*([\d.]+)\s*\|\s*$", line):
                    runs.append((float(found[1]), float(found[2])))
                if len(runs) == 1 and found:
                    warm_up_s = time.perf_counter() - began
                if len(runs) > bench.airbench_runs:
                    break
    if len(runs) < 2:
        yield {"what": bench.airbench.name, "error": f"no run was done: {said}"}
        return
    accuracies, seconds = zip(*runs[1:], strict=True)
    yield {
        "what": bench.airbench.name,
        "accuracy": round(statistics.mean(accuracies), 4),
        "seconds": round(statistics.mean(seconds), 4),
        "n": len(seconds),
        "warm_up_s": round(warm_up_s, 1),
    }


def attention(bench: GpuBenchmark) -> Iterator[Row]:
    """`attention`'s speed with two kinds of widths, and its validation accuracy by a short recipe, published as 95.30 %."""
    for batch_size in (128, 512):
        for widths, changes in WIDTHS.items():
            recipe = bench.recipe("attention", {**changes, "training.batch_size": batch_size})
            for execution in bench.executions[:2]:
                what = f"attention{widths}, batch {batch_size}, {execution}"
                yield _attempt(what, _speed, bench, recipe, bench.data(recipe), execution)
    for execution in (bench.executions[1], bench.executions[0]):
        recipe = bench.recipe("attention", {**ATTENTION, "training.execution": execution})
        row = _attempt(f"attention's short recipe, {execution}", _attention, recipe, bench.data(recipe), bench.where)
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


def study(bench: GpuBenchmark) -> Iterator[Row]:
    """A study of `attention` by what it chooses itself: a forecast of 100 trials, a few of them, and tracking's share."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        tracker = MlflowTracker(home)
        search = Search("attention", load_study("attention"), bench.settings(STUDY), 1, STUDY_TRIALS, None)
        data = bench.data(search.base)
        began = time.perf_counter()
        search, choice = decide(search, data, bench.where, None)
        how = choice.execution
        yield {"what": f"choice: {how}", "workers": choice.workers, "why": choice.why, "seconds": _since(began)}
        yield _attempt(f"forecast of {STUDY_TRIALS} trials, {how}", _forecast, search, choice, data, bench.where)
        short = replace(search, trials=bench.trials)
        yield _attempt(f"{bench.trials} trials, {how}", _trials, short, data, bench.where, tracker, home)
        yield _attempt(f"tracking, {how}", _tracking, search.base, data, bench, tracker)
        tracker.flush(60)


def _since(began: float) -> float:
    return round(time.perf_counter() - began, 2)


def _forecast(search: Search, choice: Choice, data: TrainingData, device: torch.device) -> Row:
    found = forecast(search, data, device, None, workers=choice.workers, choice=choice)
    assert found
    return {"seconds": round(found.seconds, 1), "epoch_s": round(found.epoch_s, 3), "pruned": round(found.pruned, 1)}


def _tracking(recipe: Recipe, data: TrainingData, bench: GpuBenchmark, tracker: Tracker) -> Row:
    speed = measure(recipe, data, bench.where, bench.seconds)
    measure_overhead(recipe, data, bench.where, speed, tracker)  # a process's first run takes seconds more
    overhead = measure_overhead(recipe, data, bench.where, speed, tracker)
    epochs = math.ceil(TRIAL_S / speed.epoch_s)
    seconds = trial_seconds(recipe.changed({"training.epochs": epochs}), speed, overhead)
    total = sum(seconds.values())
    return {"share": round(seconds["tracking"] / total, 4), "trial_s": round(total, 2), "epochs": epochs}


def _trials(search: Search, data: TrainingData, device: torch.device, tracker: MlflowTracker, home: Path) -> Row:
    began = time.perf_counter()
    context = StudyContext(
        search=search, data=data, device=device, storage=open_storage(home), tracker=tracker, observer=_Silent()
    )
    done = run_study.run_study(context)
    seconds = time.perf_counter() - began
    return {"seconds": round(seconds, 2), "trial_s": round(seconds / search.trials, 2), "best": done.best_value}


class _Silent:
    """Sees a study and says nothing (`search.trial.Observer`)."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *what: None


# Part -> what measures it, and the seconds that it may take, the start of its process included; the most wanted first.
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
    """The parts of these names, all where there are none; UserError for a name that isn't there."""
    names = list(only) or list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        raise UserError(f"ONLY {unknown[0]}: not one of {', '.join(PARTS)}")
    return names


def run_parts(
    bench: GpuBenchmark,
    only: Iterable[str],
    on_row: Callable[[str, Row], None],
    write: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Measure the parts of these names, all where there are none; the report, which `write` gets after each row too.

    `{"machine": ..., "parts": {name: {"state", "seconds", "reason", "traceback", "rows"}}}`; a state is "running", "done",
    "failed" or "out of time". UserError for a name that isn't there.
    """
    names = parts(only)
    report: dict[str, Any] = {"machine": machine(bench.where), "parts": {}}
    for name in names:
        part: dict[str, Any] = {"state": "running", "seconds": 0.0, "reason": "", "traceback": "", "rows": []}
        report["parts"][name] = part
        for row in _run_part(name, bench, PARTS[name][1], part):
            on_row(name, row)
            write(report)
        write(report)
    return report


def faults(report: Mapping[str, Any]) -> list[str]:
    """A line for each part that wasn't done, and for each row that failed."""
    lines = []
    for name, part in report["parts"].items():
        lines += [f"{name}: {row['what']}: {row['error']}" for row in part["rows"] if "error" in row]
        if part["state"] != "done":
            lines.append(f"{name}: {part['state']} after {part['seconds']} s: {part['reason']}")
    return lines


def _run_part(name: str, bench: GpuBenchmark, limit_s: float, part: dict[str, Any]) -> Iterator[Row]:
    """The part's rows as they come; they, and how it ended, are put into `part`."""
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("r", errors="replace") as stacks:
        process = context.Process(target=_measure_part, args=(name, bench, stacks.name, sender))
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
                os.killpg(process.pid, signal.SIGKILL)  # and whatever it started
            process.kill()
            process.join()
            part["seconds"] = round(time.monotonic() - began, 1)
            if part["state"] != "done":
                part["traceback"] = part["traceback"] or stacks.read()


def _measure_part(name: str, bench: GpuBenchmark, stacks: str, sender: Connection) -> None:
    """In the part's own process, which leads a group of its own. Where it crashes, or is asked, it writes where it is."""
    os.setsid()
    with open(stacks, "w") as file:
        faulthandler.enable(file)
        faulthandler.register(signal.SIGUSR1, file)
        try:
            for row in PARTS[name][0](bench):
                sender.send(("row", row))
            sender.send(("done", {"reason": ""}))
        except Exception as error:
            sender.send(("failed", {"reason": _told(error), "traceback": traceback.format_exc()}))
        finally:
            faulthandler.disable()
            faulthandler.unregister(signal.SIGUSR1)
