"""How fast a GPU trains here, in parts, the most wanted first (`part_runner`).

All parts take eight minutes, nine with `--airbench`.

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

from collections.abc import Callable, Iterable
from typing import Any

from pipeline.benchmarks.gpu_settings import GpuBenchmark
from pipeline.benchmarks.gpu_steps import at_once, batches, executions, networks
from pipeline.benchmarks.gpu_trainings import airbench, attention, fast, study
from pipeline.benchmarks.networks import machine
from pipeline.benchmarks.part_runner import Part, Row, run_parts
from pipeline.errors import UserError

# What measures each part, and its time limit in seconds with the start of its process; the most wanted first.
PARTS: dict[str, Part] = {
    "executions": Part(executions, 75),
    "attention": Part(attention, 90),
    "fast": Part(fast, 120),
    "at once": Part(at_once, 55),
    "study": Part(study, 55),
    "batches": Part(batches, 35),
    "networks": Part(networks, 45),
    "airbench": Part(airbench, 65),
}


def parts(only: Iterable[str]) -> list[str]:
    """These names of parts, or all where there are none; UserError for an unknown name."""
    names = list(only) or list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        raise UserError(f"`--only {unknown[0]}`", f"not one of {', '.join(PARTS)}")
    return names


def run(
    benchmark: GpuBenchmark,
    only: Iterable[str],
    on_row: Callable[[str, Row], None],
    write: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """The report of these parts, or of all where there are none, with the machine; see `part_runner.run_parts`."""
    chosen = {name: PARTS[name] for name in parts(only)}
    return run_parts(chosen, benchmark, {"machine": machine(benchmark.torch_device)}, on_row, write)
