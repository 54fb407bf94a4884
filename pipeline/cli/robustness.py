"""`robustness`: a model on corrupted images."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pipeline.cli.common import HOME, expand, find_device, is_folder, make_console, open_tracker, say
from pipeline.cli.options import DataDirOption, DeviceOption, SeenDatasetOption, TrackingOption
from pipeline.cli.views import duration, print_table
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.evaluation.robustness import Robustness


def robustness(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN|MODEL]",
            help="A run's id, or models:/NAME@ALIAS. Default: the champion, otherwise the best run.",
        ),
    ] = None,
    dataset: SeenDatasetOption = None,
    data_dir: DataDirOption = Path("data"),
    device: DeviceOption = "auto",
    tracking_uri: TrackingOption = None,
) -> None:
    """Measure accuracy on corrupted validation images: 15 kinds at 5 strengths, as in CIFAR-10-C; the run keeps it."""
    from pipeline.inference.classifier import Classifier
    from pipeline.registry import robustness as registry
    from pipeline.registry.export import find_data_of, split_as_then
    from pipeline.tracking import queries
    from pipeline.tracking.models import find_model
    from pipeline.tracking.tags import RunTags

    if model and is_folder(model):
        raise UserError(model, "a folder; what is measured of a model is kept in its run", "name the run by its id")
    console, torch_device = make_console(), find_device(device)
    tracker = open_tracker(tracking_uri)
    with find_model(HOME, tracking_uri, model) as files:
        say(console, f"model: {files.label}")
        classifier = Classifier.load(files.folder, torch_device)
    metadata = classifier.metadata
    run = queries.find_run(tracker, metadata.run_id)
    found = registry.stored(tracker, metadata.run_id)
    if found:
        say(console, "measured before:")
    else:
        data = split_as_then(metadata, find_data_of(metadata, tracker, expand(data_dir), dataset, download=True).images)
        with make_console(stderr=True).status("corrupting images") as status:
            started = time.monotonic()

            def on_part(done: int, parts: int) -> None:
                left = (time.monotonic() - started) / done * (parts - done)
                status.update(f"{done} of {parts} passes over the images, {duration(left)} left")

            found = registry.measure(classifier, data, on_part)
    _print(console, registry.keep(tracker, metadata.run_id, found))
    study = RunTags.of(run).study
    say(console, f"kept in run {metadata.run_id}: {registry.FILE} and metrics robustness/...")
    if study:
        say(console, f"`compare {study}` shows it where this is the study's winner, best trial or control")


def _print(console: Console, found: "Robustness") -> None:
    """Accuracy by kind and strength, in percent."""
    from pipeline.data.corruptions import KINDS, STRENGTHS

    strengths = [f"strength {strength}" if strength == 1 else str(strength) for strength in STRENGTHS]
    rows = [
        [kind.replace("_", " "), *(f"{100 * each:.1f}" for each in [*accuracies, mean])]
        for kind, accuracies, mean in zip(KINDS, found.accuracy, found.by_kind, strict=True)
    ]
    print_table(console, ["accuracy, %", *strengths, "mean"], rows)
    say(
        console,
        f"{100 * found.clean:.1f} % of {found.num_images:,} validation images as they are, {100 * found.mean:.1f} % corrupted "
        f"(mean corruption error {100 * (1 - found.mean):.1f} %, over 15 kinds at 5 strengths)",
    )
