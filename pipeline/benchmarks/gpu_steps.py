"""Training steps on a GPU: executions, batch sizes, several trainings at once, and a peer's script."""

import multiprocessing
import multiprocessing.context
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from pipeline.benchmarks.gpu_settings import GpuBenchmark
from pipeline.benchmarks.networks import measure_networks, peer_arguments, peer_speed, step_work
from pipeline.benchmarks.part_runner import Row, attempt, process_context
from pipeline.data.prepare import TrainingData
from pipeline.recipe import Recipe
from pipeline.search.speed import measure
from pipeline.search.study import available

NETWORKS = ("improved", "plain")
COMPILED = ("attention", "improved")  # each takes half a minute to compile
# What small networks are: `baseline` made wider, and `improved` made wider, with all of its augmentation.
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "0.3 M": ("baseline", {"model.widths": (32, 64)}),
    "2 M": ("improved", {"model.widths": (48, 96, 192), "model.hidden": 512}),
}


def networks(benchmark: GpuBenchmark) -> Iterator[Row]:
    """`improved` and `plain`, batch 128, as their studies train them: images/s, shares, and the ratio to a peer's script."""
    for name in NETWORKS:
        recipe = benchmark.recipe(name, {})
        data = benchmark.data(recipe)
        measured = measure_networks([(name, recipe, data)], benchmark.torch_device, benchmark.seconds)
        yield attempt(f"{name}, eager", next, measured)
        peers: list[float] = []
        ours: dict[str, list[float]] = {execution: [] for execution in benchmark.executions[:2]}
        for number in range(benchmark.rounds if benchmark.peer else 0):
            assert benchmark.peer
            arguments = peer_arguments(name, recipe, benchmark.data_dir, benchmark.torch_device)
            peers.append(peer_speed(benchmark.peer, arguments))
            for execution, speeds in ours.items():
                row = attempt(
                    f"{name}, {execution}, round {number + 1}", step_speed, benchmark, recipe, data, execution
                )
                yield row | {"peer_images_per_second": peers[-1]}
                speeds.append(row.get("images_per_second", 0.0))
        for execution, speeds in ours.items():
            ratios = [our_speed / its_speed for our_speed, its_speed in zip(speeds, peers, strict=True) if our_speed]
            if ratios:
                ratio = {f.__name__: round(f(ratios), 2) for f in (min, statistics.median, max)}
                yield {"what": f"{name}, {execution}, by the peer's", "ratio": ratio}


def executions(benchmark: GpuBenchmark) -> Iterator[Row]:
    """Each study's network by its base recipe, eager and graphed; then compiled, as far as time allows."""
    plain, compiled = benchmark.executions[:2], benchmark.executions[2:]
    for name, execution in [
        *((name, execution) for name in available() for execution in plain),
        *((name, execution) for name in COMPILED for execution in compiled),
    ]:
        recipe = benchmark.recipe(name, {})
        yield attempt(f"{name}, {execution}", step_speed, benchmark, recipe, benchmark.data(recipe), execution)


def batches(benchmark: GpuBenchmark) -> Iterator[Row]:
    """Two small networks and several batch sizes, eager and graphed."""
    for size, (study, changes) in SMALL.items():
        recipe = benchmark.recipe(study, changes)
        data = benchmark.data(recipe)
        for batch_size in benchmark.batch_sizes:
            changed = recipe.changed({"training.batch_size": batch_size})
            for execution in benchmark.executions[:2]:
                what = f"{size}, batch {batch_size}, {execution}"
                yield attempt(what, step_speed, benchmark, changed, data, execution)


def step_speed(benchmark: GpuBenchmark, recipe: Recipe, data: TrainingData, execution: str) -> Row:
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
    context = process_context()
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
            results.put((number, attempt("", step_speed, benchmark, recipe, data, execution)))
