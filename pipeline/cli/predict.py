"""`predict`: images classified by a model."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pipeline.cli.common import HOME, expand, find_device, make_console, model_files, say
from pipeline.cli.options import DeviceOption, ModelFilesOption, TrackingOption
from pipeline.errors import PartialFailure, Problem, UserError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    import torch

    from pipeline.inference.classifier import Classifier
    from pipeline.inference.predictions import FilePredictions

MOST_PRINTED = 10  # of the predictions that a file holds anyway
MOST_SHOWN = 12  # images of one figure


def predict(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE...", help="Images, folders of images, and CIFAR's or Kaggle's pickles of images."
        ),
    ],
    model: ModelFilesOption = None,
    method: Annotated[str, typer.Option(help="plain, tta, specialised or adaptive.")] = "plain",
    show: Annotated[bool, typer.Option("--show", help="Draw the first images with their probabilities.")] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write id, label and probabilities: .csv or .parquet.")
    ] = None,
    device: DeviceOption = "auto",
    tracking_uri: TrackingOption = None,
) -> None:
    """Classify images: class, confidence and the next two. Files that can't be used are named at the end (exit code 4)."""
    from pipeline.inference.predictions import check_output, predict_files, predictions_table, write_predictions

    if "" in files:  # as an unset variable of a shell is; as a path it would be the current folder
        raise UserError("IMAGE", "is empty", "name images or folders; `predict .` takes the current one")
    if output:
        output = expand(output)
        check_output(output)
    console = make_console()
    classifier = _classifier(model, method, find_device(device), tracking_uri, console)
    classes = classifier.metadata.classes
    with console.status("") as status:
        predicted = predict_files(
            classifier,
            [expand(Path(file)) for file in files],
            method,
            keep=MOST_SHOWN if show else 0,
            on_progress=lambda done: status.update(f"{done:,} images"),
        )
    _print_predictions(console, predicted.ids, predicted.probabilities, classes, MOST_PRINTED if output else None)
    say(console, *predicted.left_out)
    failed: list[Problem] = []  # one output that fails does not stop the other
    with _collected(failed):
        if predicted.ids and output:
            write_predictions(predictions_table(predicted.ids, predicted.probabilities, classes), output)
            say(console, f"{output}: {len(predicted.ids):,} images")
    with _collected(failed):
        if predicted.ids and show:
            _show(console, predicted, classes)
    unusable = [problem for fault in predicted.faults for problem in fault.problems]
    if failed:
        raise UserError.many(unusable + failed)
    if unusable:
        raise PartialFailure.many(unusable)


@contextlib.contextmanager
def _collected(problems: list[Problem]) -> Iterator[None]:
    """A UserError of the block becomes problems."""
    try:
        yield
    except UserError as error:
        problems += error.problems


def _classifier(
    wanted: str | None, method: str, device: "torch.device", tracking_uri: str | None, console: Console
) -> "Classifier":
    """The model that is meant, printed with what the method gains on it."""
    from pipeline.inference.classifier import Classifier
    from pipeline.inference.methods import METHODS, compare_with_plain, f1_changes

    if method not in METHODS:
        raise UserError(f"`--method {method}`", f"not one of {', '.join(METHODS)}{did_you_mean(method, METHODS)}")
    with model_files(wanted, tracking_uri) as (folder, what):
        classifier = Classifier.load(folder, device)
    say(console, f"model: {what}")
    if method != "plain":
        for summary in (compare_with_plain, f1_changes):
            say(console, summary(classifier.metadata.measured, method, classifier.metadata.classes))
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


def _show(console: Console, predicted: "FilePredictions", classes: Sequence[str]) -> None:
    """The first images with their probabilities as a PNG, opened where there is a screen."""
    from pipeline.evaluation.figures import prediction_figure, save

    count = len(predicted.images)
    more = f" (the first {count} of {len(predicted.ids):,})" if count < len(predicted.ids) else ""
    path = HOME / "prediction.png"
    figure = prediction_figure(
        predicted.images, predicted.ids[:count], predicted.probabilities[:count], classes, f"Predicted{more}"
    )
    try:
        HOME.mkdir(exist_ok=True)
        save(figure, path)
    except OSError as error:
        raise UserError(str(path), f"the figure can't be written: {error.strerror or error}") from None
    say(console, f"figure: {path}{more}")
    if sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        typer.launch(str(path))
