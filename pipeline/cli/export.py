"""`export`: a model as files."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pipeline.cli.common import HOME, existing_tracker, expand, is_folder, make_console, model_files, say
from pipeline.cli.options import MODEL_HELP, DataDirOption, SeenDatasetOption, TrackingOption
from pipeline.cli.views import print_table
from pipeline.errors import DataError, UserError, counted
from pipeline.tracking.run_id import is_run_id

if TYPE_CHECKING:
    from pipeline.data.prepare import TrainingData
    from pipeline.inference.classifier import ModelMetadata
    from pipeline.registry.export import Benchmark
    from pipeline.tracking.tracker import MlflowTracker


def export(
    model: Annotated[str | None, typer.Argument(metavar="[RUN|MODEL]", help=MODEL_HELP)] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where it goes; default mlruns/exports/<run>.")
    ] = None,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8", help="Also write a quantised model and compare it with the original; needs the data set."
        ),
    ] = False,
    dataset: SeenDatasetOption = None,
    data_dir: DataDirOption = Path("data"),
    tracking_uri: TrackingOption = None,
) -> None:
    """Write a model as ONNX with its weights, recipe and card: an MLflow model that runs no code of its own."""
    import torch

    from pipeline.inference.classifier import Classifier
    from pipeline.registry.export import difference_line
    from pipeline.registry.package import CARD, MODEL, QUANTISED_MODEL, RECIPE, package, package_place
    from pipeline.training.checkpoints import WEIGHTS

    if output:
        package_place(output := expand(output))
    console, quiet = make_console(), make_console(stderr=True)
    tracker = existing_tracker(tracking_uri)
    model = _registered(model, tracker)
    with model_files(model, tracking_uri) as (checkpoint, what):
        say(console, f"model: {what}")
        classifier = Classifier.load(checkpoint, torch.device("cpu"))
        metadata = classifier.metadata
        with quiet.status("reading the data set"):
            data, missing = _data_of(metadata, data_dir, dataset, tracker, needed=int8)
        folder = output or HOME / "exports" / metadata.run_id
        had_int8 = (folder / QUANTISED_MODEL).exists()
        # A folder's files were compared with no registry's digests, so its model is exported anew.
        is_registered = not (model and is_folder(model)) and (checkpoint / MODEL).exists()
        onnx_file = checkpoint / MODEL if is_registered else None
        with quiet.status("exporting, and comparing with torch"):
            images = data.validation.images if data else None
            made = package(tracker, metadata.run_id, checkpoint, folder, onnx_file=onnx_file, images=images)
        say(console, f"{folder}: {', '.join([MODEL, WEIGHTS, RECIPE, CARD])}; an MLflow model, for `serve` too")
        if data is None or made.difference is None:
            made_up = "compared with torch on made-up images only, not on the validation split"
            say(console, f"{'the registered file, not compared with torch again' if onnx_file else made_up}: {missing}")
        else:
            on = f"the {len(data.validation.labels):,} images of the validation split"
            say(console, difference_line(made.difference, on, classifier.image_size))
        if data is None or not int8:
            if had_int8:
                say(console, f"{QUANTISED_MODEL} of the export before is gone; `--int8` writes a new one")
            say(console, f"{MODEL}: {made.bytes / 1e6:.2f} MB, {made.latency_ms:.2f} ms an image on one thread")
            return
        with quiet.status("quantising and measuring"):
            benchmarks = _quantised(folder, data)
        _print_benchmarks(console, benchmarks)


def _registered(model: str | None, tracker: "MlflowTracker | None") -> str | None:
    """The version that a run's id stands for where it was promoted: its files are those that were evaluated."""
    from pipeline.registry.registered_model import promoted_versions

    if model is None or tracker is None or not is_run_id(model):
        return model
    versions = [f"models:/{version.name}/{version.version}" for version in promoted_versions(tracker, model)]
    return next(iter(versions), model)


def _data_of(
    metadata: "ModelMetadata", data_dir: Path, dataset: str | None, tracker: "MlflowTracker | None", needed: bool
) -> tuple["TrainingData | None", str]:
    """The data set that the model was trained on; else None and why, or DataError. Downloaded only where `needed`.

    DataError too where `dataset` names another.
    """
    from pipeline.registry.export import find_data_of, split_as_then

    try:
        return split_as_then(
            metadata, find_data_of(metadata, tracker, expand(data_dir), dataset, download=needed).images
        ), ""
    except UserError as error:
        if not needed and dataset:
            raise
        if not needed:
            return None, error.lines[0]
        rule = "needs the data set that the model was trained on: training images calibrate, validation images measure"
        raise DataError("`--int8`", rule, details=error.lines) from None


def _quantised(folder: Path, data: "TrainingData") -> dict[str, "Benchmark"]:
    """Write model.int8.onnx; both models, measured on the validation split."""
    from pipeline.registry.export import benchmark, calibration_pixels, quantise
    from pipeline.registry.package import MODEL, QUANTISED_MODEL

    quantise(folder / MODEL, folder / QUANTISED_MODEL, calibration_pixels(data))
    images, labels = data.validation.images, data.validation.labels.numpy()
    return {name: benchmark(folder / name, images, labels) for name in (MODEL, QUANTISED_MODEL)}


def _print_benchmarks(console: Console, benchmarks: dict[str, "Benchmark"]) -> None:
    rows = {
        "accuracy, validation split": [f"{each.accuracy:.2%}" for each in benchmarks.values()],
        "macro-F1": [f"{each.f1_macro:.2%}" for each in benchmarks.values()],
        "size, MB": [f"{each.bytes / 1e6:.2f}" for each in benchmarks.values()],
    }
    for threads in next(iter(benchmarks.values())).latency_ms:
        on = counted(threads, "thread")
        rows[f"one image, {on}, ms"] = [f"{each.latency_ms[threads]:.2f}" for each in benchmarks.values()]
        rows[f"images/s in batches of 64, {on}"] = [
            f"{each.images_per_second[threads]:,.0f}" for each in benchmarks.values()
        ]
    print_table(console, ["", *benchmarks], [[name, *cells] for name, cells in rows.items()])
