"""`predict` and `ensemble`."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pipeline.cli.common import HOME, expand, find_device, make_console, model_files, say
from pipeline.cli.options import DeviceOption, TrackingOption
from pipeline.errors import PartialFailure, UserError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    import torch

    from pipeline.inference.classifier import Classifier
    from pipeline.inference.predictions import FilePredictions

MOST_PRINTED = 10  # of the predictions that a file holds anyway
MOST_SHOWN = 12  # images of one picture


def predict(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Images, folders of images, and CIFAR's or Kaggle's pickles of images."),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A run's id, a folder with weights, or models:/NAME@ALIAS. Default: the champion, else the best run.",
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="plain, tta, specialised or adaptive.")] = "plain",
    show: Annotated[bool, typer.Option("--show", help="Draw the first images with their probabilities.")] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write id, label and probabilities: .csv or .parquet.")
    ] = None,
    device: DeviceOption = "auto",
    tracking_uri: TrackingOption = None,
) -> None:
    """Classify images: class, confidence and the next two. Files that are no use are named at the end (exit code 4)."""
    from pipeline.inference.predictions import check_output, predict_files, predictions_table, write_predictions

    if output:
        output = expand(output)
        check_output(output)
    console = make_console()
    classifier = _classifier(model, method, find_device(device), tracking_uri, console)
    classes = classifier.metadata.classes
    with console.status("") as status:
        found = predict_files(
            classifier,
            [expand(file) for file in files],
            method,
            keep=MOST_SHOWN if show else 0,
            on_progress=lambda done: status.update(f"{done:,} images"),
        )
    _print_predictions(console, found.ids, found.probabilities, classes, MOST_PRINTED if output else None)
    failed: list[str] = []  # what else is to be told does not wait for it
    with _told_later(failed):
        if found.ids and output:
            write_predictions(predictions_table(found.ids, found.probabilities, classes), output)
            say(console, f"{output}: {len(found.ids):,} images")
    with _told_later(failed):
        if found.ids and show:
            _show(console, found, classes)
    useless = [line for fault in found.faults for line in fault.lines]
    if failed:
        raise UserError(useless + failed)
    if useless:
        raise PartialFailure(useless)


@contextlib.contextmanager
def _told_later(lines: list[str]) -> Iterator[None]:
    """The user's faults within become lines."""
    try:
        yield
    except UserError as error:
        lines += error.lines


def _classifier(
    wanted: str | None, method: str, device: "torch.device", tracking_uri: str | None, console: Console
) -> "Classifier":
    """The model that is meant, and said; with what the method gains on it."""
    from pipeline.inference.classifier import Classifier
    from pipeline.inference.methods import METHODS, compare_with_plain, f1_changes

    if method not in METHODS:
        raise UserError(f"METHOD {method}: not one of {', '.join(METHODS)}{did_you_mean(method, METHODS)}")
    with model_files(wanted, tracking_uri) as (folder, what):
        classifier = Classifier.load(folder, device)
    say(console, f"model: {what}")
    if method != "plain":
        for tell in (compare_with_plain, f1_changes):
            say(console, tell(classifier.metadata.measured, method, classifier.metadata.classes))
    return classifier


def _print_predictions(
    console: Console, ids: list[str], probabilities: "np.ndarray", classes: Sequence[str], most: int | None
) -> None:
    """A line per image: its class and the next two, with their probabilities."""
    for name, row in list(zip(ids, probabilities, strict=True))[:most]:
        best = (-row).argsort(kind="stable")[:3]
        say(console, f"{name}: {', '.join(f'{classes[i]} {row[i]:.1%}' for i in best)}")
    if most and len(ids) > most:
        say(console, f"and {len(ids) - most:,} more")


def _show(console: Console, found: "FilePredictions", classes: Sequence[str]) -> None:
    """The first images with their probabilities as a PNG, opened where there is a screen."""
    from pipeline.evaluation.figures import prediction_figure, save

    count = len(found.images)
    more = f" (the first {count} of {len(found.ids):,})" if count < len(found.ids) else ""
    path = HOME / "prediction.png"
    figure = prediction_figure(
        found.images, found.ids[:count], found.probabilities[:count], classes, f"Predicted{more}"
    )
    try:
        HOME.mkdir(exist_ok=True)
        save(figure, path)
    except OSError as error:
        raise UserError(f"{path}: the picture can't be written: {error.strerror or error}") from None
    say(console, f"picture: {path}{more}")
    if sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        typer.launch(str(path))


def ensemble(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Two or more tables of predict --output.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="Where the mean goes: .csv or .parquet.")],
) -> None:
    """Average the probabilities of several predictions of the same images."""
    from pipeline.inference.predictions import average, check_output, read_predictions, write_predictions

    output, files = expand(output), [expand(file) for file in files]
    check_output(output)
    if len(files) < 2:
        raise UserError(f"{files[0]}: one file; an ensemble needs at least two")
    if twice := [file for i, file in enumerate(files) if file.resolve() in [other.resolve() for other in files[:i]]]:
        raise UserError(f"{twice[0]}: named twice; each file has one voice")
    table = average({str(file): read_predictions(file) for file in files})
    write_predictions(table, output)
    say(make_console(), f"{output}: {len(table):,} images, the mean of {len(files)} files")
