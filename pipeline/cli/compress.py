"""`compress`: a run's network pruned, trained on and compared."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.cli.common import (
    HOME,
    find_device,
    interruptible,
    load_data_of_run,
    make_console,
    model_files,
    next_command,
    open_tracker,
    print_links,
    say,
)
from pipeline.cli.options import DataDirOption, DeviceOption, SeenDatasetOption, TrackingOption

if TYPE_CHECKING:
    from pipeline.registry.compress import Compression, ModelRow


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
    dataset: SeenDatasetOption = None,
    data_dir: DataDirOption = Path("data"),
    device: DeviceOption = "auto",
    tracking_uri: TrackingOption = None,
) -> None:
    """Remove a run's least important channels, train on, and compare: original and pruned, both in 8 bits too.

    The pruned network is a run of its own, which can be promoted, exported and reproduced. The same command shows it again.
    """
    import torch

    from pipeline.cli.views_finals import FinalsView
    from pipeline.experiment import Interrupted
    from pipeline.inference.classifier import Classifier
    from pipeline.registry import compress as compression

    torch_device, console, quiet = find_device(device), make_console(), make_console(stderr=True)
    tracker = open_tracker(tracking_uri)
    with model_files(run, tracking_uri) as (checkpoint, what):
        original = Classifier.load(checkpoint, torch.device("cpu"))
    with quiet.status("pruning"):
        plan = compression.plan_compression(tracker, original, sparsity, epochs, torch_device)
    parent = plan.parent.info.run_id
    data = load_data_of_run(tracker, parent, f"run {parent}", [plan.recipe], data_dir, dataset, torch_device)
    say(console, f"{what}: {_changes(plan)}")
    compressed = compression.finished_run(tracker, plan)
    if compressed:
        say(console, f"trained already: run {compressed}")
    else:
        with (
            interruptible(
                console, tracker, (Interrupted, KeyboardInterrupt), "interrupted; the same command starts anew"
            ),
            FinalsView(console, 1) as view,
        ):
            view.started(plan.name, plan.recipe)
            outcome = compression.train(tracker, plan, data, torch_device, view.epoch)
            view.ended(plan.name, outcome)
        compressed = tracker.id_of(outcome.run_key)
    with quiet.status("exporting and measuring"):
        rows = compression.measure(tracker, plan, compressed, data, HOME / "exports" / compressed)
    _print_rows(console, rows)
    _print_next(console, compressed, tracking_uri)


def _changes(plan: "Compression") -> str:
    """What differs from the original's recipe, for a person."""
    before, after = plan.original.metadata.recipe, plan.recipe
    fields = before.difference(after)
    fields.pop("transfer.weights", None)
    return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in fields.items())


def _print_rows(console: Console, rows: "list[ModelRow]") -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for head in ("", "val/accuracy", "parameters", "MFLOP", "ms, one thread", "MB"):
        table.add_column(head, no_wrap=True, justify="right" if head else "left")
    for row in rows:
        table.add_row(
            row.model,
            f"{row.accuracy:.2%}",
            f"{row.parameters:,}",
            f"{row.flop / 1e6:,.1f}",
            f"{row.latency_ms:.3f}",
            f"{row.bytes / 1e6:.2f}",
        )
    console.print(table)


def _print_next(console: Console, run_id: str, tracking_uri: str | None) -> None:
    folder = HOME / "exports" / run_id
    links = [
        ("its files", str(folder)),
        ("make it champion", next_command(f"promote --run {run_id}", tracking_uri)),
        ("classify with it", next_command(f"predict IMAGE --model {run_id}", tracking_uri)),
    ]
    print_links(console, "Next:", links)
