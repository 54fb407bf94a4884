"""Complete trainings on a GPU: speed runs, `attention` and a study."""

import contextlib
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.benchmarks.gpu_settings import GpuBenchmark
from pipeline.benchmarks.gpu_steps import step_speed
from pipeline.benchmarks.part_runner import Row, attempt
from pipeline.data.datasets import Split
from pipeline.data.prepare import TrainingData
from pipeline.experiment import publish
from pipeline.recipe import Recipe
from pipeline.registry.speed_runs import six_views, speed_run_data
from pipeline.search import run_study
from pipeline.search.choice import choose_execution
from pipeline.search.forecast import forecast
from pipeline.search.search import Search
from pipeline.search.speed import Stopwatch, measure, measure_overhead, trial_seconds
from pipeline.search.storage import open_storage
from pipeline.search.study import load_study
from pipeline.search.study_attributes import Choice
from pipeline.search.trial import StudyContext, StudyObserver
from pipeline.tracking.tags import State
from pipeline.tracking.tracker import MlflowTracker, RunRequest, Tracker
from pipeline.training.loop import train

# `attention` as published, and with widths that fill tensor cores.
WIDTHS: dict[str, dict[str, Any]] = {"": {}, " of 32 to 256": {"model.widths": (32, 64, 128, 256)}}
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
TRIAL_S = 10.0  # of the trial whose share of tracking is measured


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
            yield attempt(
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
    with tracker.run(RunRequest(name=f"seed {seed}", recipe=recipe, data=data)) as tracked:
        result = train(
            recipe, data, device, lambda report: tracked.log_metrics(report.metrics, report.epoch), on_part=watch
        )
        total, _ = watch.seconds()
        views_began = time.perf_counter()
        logits = six_views(result.network, scored.images[:], data.mean, data.std, recipe.training.precision)
        accuracy = (logits.argmax(1) == scored.labels).double().mean().item()
        views_s = time.perf_counter() - views_began
        tracked.log_metrics(publish(tracked, recipe, data, result), recipe.training.epochs)
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
                yield attempt(what, step_speed, benchmark, recipe, benchmark.data(recipe), execution)
    for execution in (benchmark.executions[1], benchmark.executions[0]):
        recipe = benchmark.recipe("attention", {**ATTENTION, "training.execution": execution})
        row = attempt(
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
        search, choice = choose_execution(search, data, benchmark.torch_device, None)
        execution, seconds = choice.execution, round(time.perf_counter() - began, 2)
        yield {"what": f"choice: {execution}", "workers": choice.workers, "why": choice.why, "seconds": seconds}
        yield attempt(
            f"forecast of {STUDY_TRIALS} trials, {execution}", _forecast, search, choice, data, benchmark.torch_device
        )
        short = replace(search, trials=benchmark.trials)
        yield attempt(
            f"{benchmark.trials} trials, {execution}", _trials, short, data, benchmark.torch_device, tracker, home
        )
        yield attempt(f"tracking, {execution}", _tracking, search.base, data, benchmark, tracker)
        tracker.flush(60)


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
        search=search, data=data, device=device, storage=open_storage(home), tracker=tracker, observer=StudyObserver()
    )
    result = run_study.run_study(context)
    seconds = time.perf_counter() - began
    return {"seconds": round(seconds, 2), "trial_s": round(seconds / search.trials, 2), "best": result.best_value}
