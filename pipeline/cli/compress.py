"""`compress`: a run's network pruned, trained on and compared, and one distilled from it."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pipeline.cli.common import (
    HOME,
    find_device,
    interruptible,
    load_data_of_run,
    make_console,
    model_files,
    open_tracker,
    print_next,
    say,
)
from pipeline.cli.options import DataDirOption, DeviceOption, SeenDatasetOption, TrackingOption
from pipeline.cli.views import print_table

if TYPE_CHECKING:
    import torch

    from pipeline.data.prepare import TrainingData
    from pipeline.registry.compress import Compression, ModelRow
    from pipeline.tracking.tracker import MlflowTracker


def compress(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A finished run's id, or models:/NAME@ALIAS.")],
    sparsity: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            min=0.01,
            max=0.99,
            help="Share of a prediction's multiply-adds that is removed: 0.5 halves them, with about 0.7 of the channels "
            "left; by whole channels, the same share of each layer's.",
        ),
    ] = 0.5,
    epochs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=10_000,
            help="Of the training after the pruning, by the run's recipe at 0.3 of its learning rate. Default: a quarter of "
            "the run's.",
        ),
    ] = None,
    distil: Annotated[
        bool,
        typer.Option(
            "--distil/--no-distil",
            help="Also train a network of the pruned one's shape from random weights, by the run's own recipe and with the "
            "run as teacher.",
        ),
    ] = False,
    dataset: SeenDatasetOption = None,
    data_dir: DataDirOption = Path("data"),
    device: DeviceOption = "auto",
    tracking_uri: TrackingOption = None,
) -> None:
    """Remove a run's least important channels, train on, and compare: original and pruned, both in 8 bits too.

    The pruned network, and the distilled one, is a run of its own, which can be promoted, exported and reproduced. The same
    command shows it again.
    """
    import torch

    from pipeline.inference.classifier import Classifier
    from pipeline.registry import compress as compression

    torch_device, console, quiet = find_device(device), make_console(), make_console(stderr=True)
    tracker = open_tracker(tracking_uri)
    with model_files(run, tracking_uri) as (checkpoint, what):
        original = Classifier.load(checkpoint, torch.device("cpu"))
    with quiet.status("pruning"):
        plans = compression.plan_compressions(tracker, original, sparsity, epochs, distil, torch_device)
    parent, recipes = plans[0].parent.info.run_id, [plan.recipe for plan in plans]
    data = load_data_of_run(tracker, parent, f"run {parent}", recipes, data_dir, dataset, torch_device)
    say(console, what, *(f"{plan.method}: {_changes(plan)}" for plan in plans))
    runs = {_trained(console, tracker, plan, data, torch_device): plan for plan in plans}
    with quiet.status("exporting and measuring"):
        rows = compression.measure(tracker, runs, data, HOME / "exports")
    _print_rows(console, rows)
    _print_next(console, runs)


def _trained(
    console: Console, tracker: "MlflowTracker", plan: "Compression", data: "TrainingData", device: "torch.device"
) -> str:
    """The run that trained this, before or now."""
    from pipeline.cli.views_finals import FinalsView
    from pipeline.experiment import Interrupted
    from pipeline.registry import compress as compression

    if found := compression.finished_run(tracker, plan):
        say(console, f"{plan.method}: trained already, run {found}")
        return found
    line = f"interrupted; the same command trains {plan.name} anew"
    with (
        interruptible(console, tracker, (Interrupted, KeyboardInterrupt), line),
        FinalsView(console, 1) as view,
    ):
        view.started(plan.name, plan.recipe)
        outcome = compression.train(tracker, plan, data, device, partial(view.epoch, plan.name))
        view.ended(plan.name, outcome)
    return tracker.id_of(outcome.run_key)


def _changes(plan: "Compression") -> str:
    """What differs from the original's recipe, for a person."""
    fields = plan.original.metadata.recipe.difference(plan.recipe)
    fields.pop("transfer.weights", None)
    if teacher := fields.pop("loss.teacher", None):
        fields["loss.teacher"] = (teacher[0], "this run")
    return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in fields.items())


def _print_rows(console: Console, rows: "list[ModelRow]") -> None:
    cells = [
        (
            row.model,
            f"{row.accuracy:.2%}",
            f"{row.parameters:,}",
            f"{row.flop / 1e6:,.1f}",
            f"{row.latency_ms:.3f}",
            f"{row.bytes / 1e6:.2f}",
        )
        for row in rows
    ]
    print_table(console, ("", "val/accuracy", "parameters", "MFLOP", "ms, one thread", "MB"), cells)


def _print_next(console: Console, runs: "Mapping[str, Compression]") -> None:
    """`runs`: run -> what it trained."""
    rules = "--rules 'may_lose=2 size_factor=0.9'"  # points of the objective, for so many of the champion's bytes
    steps = {}
    for run_id, plan in runs.items():
        steps[f"{plan.method}: make it champion"] = f"promote --run {run_id} {rules}"
        steps[f"{plan.method}: classify with it"] = f"predict IMAGE --model {run_id}"
    files = [(f"{plan.method}: its files", str(HOME / "exports" / run_id)) for run_id, plan in runs.items()]
    print_next(console, steps, files)
