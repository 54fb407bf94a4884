"""`bench-gpu`: what a GPU is worth here."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.common import HOME, data_folder, expand, make_console, say, writable
from pipeline.cli.options import DataDirOption
from pipeline.disk import replacing
from pipeline.errors import Problem, UserError

if TYPE_CHECKING:
    from rich.console import Console


def bench_gpu(
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="Where the whole report goes, as JSON, row by row.")
    ] = HOME / "bench-gpu.json",
    peer: Annotated[
        Path | None, typer.Option(metavar="SCRIPT", help="A peer's script, as for bench --against.")
    ] = None,
    airbench: Annotated[
        Path | None, typer.Option(metavar="SCRIPT", help="airbench94_muon.py, to run and compare with fast.")
    ] = None,
    data_dir: DataDirOption = Path("data"),
    only: Annotated[str, typer.Option(metavar="PART,PART", help="Only these parts.")] = "",
) -> None:
    """Measure on a GPU, in under eight minutes: executions of a step, attention, speed runs, trainings at once, a study.

    A part that fails or takes too long is reported, with its traceback in the report, and the others run; the exit code is
    then 1. With --airbench it takes a minute more. How to run it where there is no network: pipeline/benchmarks/gpu.py.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError("`bench-gpu`", "torch sees no GPU here", "`bench` measures on a CPU")

    from pipeline.benchmarks.gpu import parts, run
    from pipeline.benchmarks.gpu_settings import GpuBenchmark
    from pipeline.benchmarks.part_runner import failures
    from pipeline.data.datasets import load
    from pipeline.sections.data import Data

    scripts = [expand(script) if script else None for script in (peer, airbench)]
    if missing := [script for script in scripts if script and not script.is_file()]:
        raise UserError.many([Problem(str(script), "no such file") for script in missing])
    names = parts(name.strip() for name in only.split(",") if name.strip())
    file, about = writable(expand(output)), Data(dataset="cifar10", image_size=32)
    load(about, data_folder(data_dir, about.dataset))  # downloaded or refused before anything starts

    def write(report: "Mapping[str, object]") -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as new:  # or a command that is stopped while it writes loses all
            new.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    console = make_console()
    bench = GpuBenchmark(data_dir=expand(data_dir), home=HOME, peer=scripts[0], airbench=scripts[1])
    report = run(bench, names, _row_printer(console), write)
    for line in failures(report):
        say(console, f"failed: {line}")
    say(console, f"the report: {file}")
    raise typer.Exit(1 if failures(report) else 0)


def _row_printer(console: "Console") -> "Callable[[str, Mapping[str, object]], None]":
    """A line for each row: numbers and short words; lists, tables and tracebacks are for the report."""

    def show(part: str, row: "Mapping[str, object]") -> None:
        shown = {name: value for name, value in row.items() if name != "traceback"}
        numbers = [f"{name} {value}" for name, value in shown.items() if isinstance(value, (int, float, str))]
        ratio = row.get("ratio")
        if isinstance(ratio, dict):
            numbers.append(" ".join(f"{name} {value}" for name, value in ratio.items()))
        say(console, f"{part:<11} {', '.join(numbers).removeprefix('what ')}")

    return show
