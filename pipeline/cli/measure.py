"""`bench` and `bench-gpu`."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.common import HOME, expand, find_device, load_data, make_console, say, writable
from pipeline.cli.options import DataDirOption, DatasetOption, DeviceOption, resolve
from pipeline.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.data.prepare import TrainingData
    from pipeline.recipe import Recipe


def bench(
    model: Annotated[str, typer.Option(help="A network by the name of its study, or all.")] = "all",
    dataset: DatasetOption = None,
    data_dir: DataDirOption = Path("data"),
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
    peer: Annotated[
        Path | None,
        typer.Option("--against", metavar="SCRIPT", help="Run a peer's script alternately with ours; needs --model."),
    ] = None,
) -> None:
    """Measure how fast each network trains by its study's base recipe, and where the time goes; stores nothing."""
    from pipeline.search.study import available

    if peer and model == "all":
        raise UserError("AGAINST: compares one network; say MODEL=improved")
    names = available() if model == "all" else [model]
    searches = [resolve(name, {"device": device}, dataset, [], []) for name in names]
    if peer and searches[0].base.data.dataset != "cifar10":
        raise UserError(f"DATASET {dataset}: peers train on CIFAR-10; leave it out")

    from pipeline.benchmarks.networks import against, benchmark, check_script, machine
    from pipeline.cli.views import print_bench

    if peer:
        check_script(expand(peer), model)
    where = find_device(device)

    def networks() -> "Iterator[tuple[str, Recipe, TrainingData]]":
        data, loaded = None, None
        for search in searches:
            if data is None or search.base.data != loaded:
                data, loaded = load_data(search, data_dir, where), search.base.data
            status.update(search.name)
            yield search.name, search.base, data

    report = machine(where) | {"dataset": searches[0].base.data.dataset}
    with make_console(stderr=True).status("preparing") as status:
        report["results"] = list(benchmark(networks(), where))
        if peer:
            status.update(f"{model} and {peer.name}, in turn")
            directory = expand(data_dir)
            report["results"][0]["against"] = against(expand(peer), model, searches[0].base, directory, where)
    if as_json:
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        print_bench(make_console(), report)


def bench_gpu(
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="Where the whole report goes, as JSON, row by row.")
    ] = HOME / "bench-gpu.json",
    peer: Annotated[Path | None, typer.Option(metavar="SCRIPT", help="A peer's script, as bench --against.")] = None,
    airbench: Annotated[
        Path | None, typer.Option(metavar="SCRIPT", help="airbench94_muon.py, to run_parts beside `fast`.")
    ] = None,
    data_dir: DataDirOption = Path("data"),
    only: Annotated[str, typer.Option(metavar="PART,PART", help="Not all of the parts.")] = "",
) -> None:
    """Measure on a GPU, in under eight minutes: executions of a step, attention, speed runs, trainings at once, a study.

    A part that fails or takes too long is told, with its traceback in the report, and the others go on; the exit code is
    then 1. With --airbench it takes a minute more. How to run it where there is no network: pipeline/bench_gpu.py.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError("bench-gpu: torch sees no GPU here; make bench measures on a CPU")

    from pipeline.benchmarks.gpu import GpuBenchmark, faults, parts, run_parts
    from pipeline.data.datasets import load

    scripts = [expand(script) if script else None for script in (peer, airbench)]
    if missing := [script for script in scripts if script and not script.is_file()]:
        raise UserError([f"{script}: no such file" for script in missing])
    names = parts(name.strip() for name in only.split(",") if name.strip())
    file = writable(expand(output))
    load("cifar10", 32, expand(data_dir))  # downloaded or refused before anything starts

    def write(report: "Mapping[str, object]") -> None:
        whole = file.with_name(f"{file.name}.new")  # or a command that is ended while it writes loses all
        whole.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        whole.replace(file)

    console = make_console()
    bench = GpuBenchmark(data_dir=expand(data_dir), home=HOME, peer=scripts[0], airbench=scripts[1])
    report = run_parts(bench, names, _row_printer(console), write)
    for line in faults(report):
        say(console, f"failed: {line}")
    say(console, f"the report: {file}")
    raise typer.Exit(1 if faults(report) else 0)


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
