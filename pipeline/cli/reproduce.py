"""`reproduce`: a run trained again and compared."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.common import find_device, interruptible, load_data_of_run, make_console, open_tracker, say
from pipeline.cli.options import DataDirOption, DeviceOption, SeenDatasetOption, TrackingOption


def reproduce(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's id.")],
    dataset: SeenDatasetOption = None,
    data_dir: DataDirOption = Path("data"),
    device: DeviceOption = "auto",
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS",
            min=0,
            max=100,
            help="By which validation accuracy may differ where equal bits can't be expected. Default: 3 standard "
            "deviations between two seeds, sqrt((1 - accuracy) / images); 1.0 at 94 % of 5,000.",
        ),
    ] = None,
    tracking_uri: TrackingOption = None,
) -> None:
    """Train a run again from what MLflow holds and compare: bit for bit where code, versions and processor are the same.

    A run that was pruned, interrupted or failed is compared over the epochs that it had.
    """
    from pipeline.cli.views_finals import FinalsView
    from pipeline.experiment import Interrupted
    from pipeline.registry import reproduce as again

    torch_device = find_device(device)
    tracker = open_tracker(tracking_uri)
    original = again.find_original(tracker, run)
    if device == "auto" and original.device == "cpu":
        torch_device = find_device("cpu")
    data = load_data_of_run(
        tracker, run, f"run {run}", [original.recipe_on(torch_device)], data_dir, dataset, torch_device
    )
    console = make_console()
    say(console, f"{original.name}: {original.state}, {original.epochs} epochs")
    differences = again.differences(tracker, original, torch_device)
    threads = again.thread_line(original, torch_device)
    say(console, *(f"  {line}" for line in (threads, *(difference.line for difference in differences)) if line))
    if not any(difference.matters for difference in differences):
        say(console, "nothing that matters differs from then: every bit must be equal")
    with (
        interruptible(console, tracker, (Interrupted, KeyboardInterrupt), "interrupted; nothing was compared"),
        FinalsView(console, 1) as view,
    ):
        view.started("reproduction", original.recipe)
        outcome = again.reproduce(tracker, original, data, torch_device, partial(view.epoch, "reproduction"))
        view.ended("reproduction", outcome)
    say(console, *again.conclude(tracker, original, outcome, differences, len(data.validation.labels), tolerance))
