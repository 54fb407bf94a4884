"""`bench`: how fast each network trains here."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from pipeline.cli.common import expand, find_device, load_data, make_console
from pipeline.cli.options import DataDirOption, DatasetOption, DeviceOption, StudyOptions, resolve
from pipeline.cli.views import duration, print_table
from pipeline.errors import Problem, UserError, did_you_mean

if TYPE_CHECKING:
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
        raise UserError("`--against`", "compares one network", "name it by `--model`")
    if model not in ("all", *available()):
        raise UserError(
            f"`--model {model}`",
            f"no such network{did_you_mean(model, available())}",
            f"there are all, {', '.join(available())}",
        )
    problems: list[Problem] = []
    options = StudyOptions.parse({"device": device}, problems)
    names = available() if model == "all" else [model]
    searches = [resolve(name, options, dataset, [], problems) for name in names]
    if peer and searches[0].base.data.dataset != "cifar10":
        raise UserError(f"`--dataset {dataset}`", "peers train on CIFAR-10", "leave it out")

    from pipeline.benchmarks.networks import against, check_script, machine, measure_networks

    if peer:
        check_script(expand(peer), model)
    torch_device = find_device(device)

    def networks() -> "Iterator[tuple[str, Recipe, TrainingData]]":
        data, loaded = None, None
        for search in searches:
            if data is None or search.base.data != loaded:
                data, loaded = load_data(search, data_dir, torch_device), search.base.data
            status.update(search.name)
            yield search.name, search.base, data

    report = machine(torch_device) | {"dataset": searches[0].base.data.dataset}
    with make_console(stderr=True).status("preparing") as status:
        report["results"] = list(measure_networks(networks(), torch_device))
        if peer:
            status.update(f"{model} and {peer.name}, in turn")
            directory = expand(data_dir)
            report["results"][0]["against"] = against(expand(peer), model, searches[0].base, directory, torch_device)
    if as_json:
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        _print_table(make_console(), report)


def _print_table(console: Console, report: Mapping[str, Any]) -> None:
    """A column per network, and a line for each comparison with a peer's script."""
    results = report["results"]
    console.print(
        f"{report['dataset']}; {report['hardware']}, {report['threads']} threads, torch {report['torch']}, "
        f"load {report['load']} before; images/s of training, and the shares of a whole trial",
        markup=False,
        soft_wrap=True,
    )
    rows = {
        "images/s": [f"{result['images_per_second']:,.0f}" for result in results],
        "batch": [str(result["batch_size"]) for result in results],
        "epoch": [duration(result["epoch_s"]) for result in results],
    }
    rows |= {part: [f"{result['shares'][part]:.1%}" for result in results] for part in results[0]["shares"]}
    if results[0]["bf16_peak_share"] is not None:
        rows["of bf16 peak"] = [f"{result['bf16_peak_share']:.1%}" for result in results]
        rows["of bandwidth"] = [f"{result['bandwidth_share']:.1%}" for result in results]
    print_table(
        console, ["", *(result["model"] for result in results)], [[name, *cells] for name, cells in rows.items()]
    )
    for result in results:
        if peer := result.get("against"):
            ratio = peer["ratio"]
            console.print(
                f"{result['model']} and {peer['script']}: {ratio['median']:.2f} times its images/s "
                f"({ratio['min']:.2f} to {ratio['max']:.2f} in {len(peer['images_per_second'])} rounds)",
                markup=False,
            )
