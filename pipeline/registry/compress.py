"""A finished run's network without its least important channels, trained on for a while; what that costs and saves."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from mlflow.entities import Run as StoredRun

from pipeline import experiment
from pipeline.data.datasets import Split
from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.evaluation.scores import score
from pipeline.experiment import ExperimentRequest
from pipeline.inference.classifier import Classifier
from pipeline.models.build import build_network, num_parameters, prediction_flop
from pipeline.models.pruning import LIBRARY, narrower, pruned
from pipeline.processes import this_process
from pipeline.recipe import Recipe
from pipeline.registry import export, initial_weights
from pipeline.registry.finals import check_same_data
from pipeline.registry.package import MODEL, QUANTISED_MODEL, package
from pipeline.tracking import recovery
from pipeline.tracking.models import find_model
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker
from pipeline.training.execution import executable_on
from pipeline.training.loop import EpochReport

EPOCHS_SHARE = 0.25  # of the original's, by default
RATE_SHARE = 0.3  # of the original's learning rates
TABLE = "compression.csv"  # among the run's artifacts


@dataclass(frozen=True)
class Compression:
    """What is to be trained: the pruned network of a finished run, by the rest of its recipe."""

    parent: StoredRun
    original: Classifier  # on the CPU
    recipe: Recipe
    sparsity: float

    @property
    def name(self) -> str:
        """Of its run."""
        return f"{self.parent.info.run_name} (sparsity {self.sparsity:g})"


@dataclass(frozen=True)
class ModelRow:
    """One ONNX model beside others: its validation accuracy in [0, 1], and what it costs."""

    model: str
    accuracy: float
    parameters: int
    flop: int  # of one prediction
    latency_ms: float  # one image, onnxruntime, one thread
    bytes: int


def plan_compression(
    tracker: MlflowTracker, original: Classifier, sparsity: float, epochs: int | None, device: torch.device
) -> Compression:
    """The pruned network's recipe, whose initial weights are kept.

    `epochs` default to EPOCHS_SHARE of the original's. UserError where the network can't be pruned, or not so far.
    """
    metadata = original.metadata
    if metadata.members:
        raise UserError(
            f"run {metadata.run_id}", "is an ensemble, which has no recipe to train on by", "compress a member"
        )
    recipe, num_classes = metadata.recipe, len(metadata.classes)
    narrow = narrower(recipe, sparsity, num_classes)
    network = pruned(original.network, narrow, num_classes)
    rates = {
        name: rate * RATE_SHARE
        for name, rate in recipe.flat().items()
        if name.startswith("optimizer.") and name.endswith("lr")
    }
    changes = {
        **rates,
        "training.epochs": epochs or math.ceil(recipe.training.epochs * EPOCHS_SHARE),
        "transfer.weights": initial_weights.keep(network, tracker.home),
        "transfer.frozen_epochs": 0,
        "transfer.frozen_share": 0.0,
    }
    parent = tracker.client.get_run(metadata.run_id)
    return Compression(parent, original, executable_on(narrow.changed(changes), device), sparsity)


def finished_run(tracker: MlflowTracker, compression: Compression) -> str | None:
    """The run that trained just this already, if there is one."""
    info, digest = compression.parent.info, compression.recipe.digest()
    query = f"tags.compresses = '{info.run_id}' and tags.recipe_digest = '{digest}' and tags.state = '{State.FINISHED}'"
    return next((str(run.info.run_id) for run in tracker.store.search([info.experiment_id], query)), None)


def train(
    tracker: MlflowTracker,
    compression: Compression,
    data: TrainingData,
    device: torch.device,
    on_epoch: Callable[[EpochReport], None] = lambda report: None,
) -> experiment.Outcome:
    """Train the pruned network under a run of its own, a child of the original's, with the role `compressed`.

    Raises Interrupted where the user asks to stop, DataError where the data is not what the original saw, UserError where
    the training fails.
    """
    parent = compression.parent
    run_id, tags = parent.info.run_id, RunTags.of(parent)
    check_same_data(f"run {run_id}", tags, data)
    recovery.close_abandoned_runs(tracker, parent.info.experiment_id)
    own_tags = RunTags(
        role="compressed",
        study=tags.study,
        compresses=run_id,
        sparsity=compression.sparsity,
        pruner=LIBRARY,
        worker=this_process(),
    )
    request = ExperimentRequest(
        recipe=compression.recipe,
        data=data,
        device=device,
        name=compression.name,
        parent_run=run_id,
        tags=own_tags,
        on_epoch=on_epoch,
    )
    outcome = experiment.run_until_stopped(request, tracker)
    if outcome.state is not State.FINISHED:
        raise UserError(compression.name, f"{outcome.state}: {outcome.reason}")
    initial_weights.attach(tracker, tracker.id_of(outcome.run_key), compression.recipe)
    return outcome


def measure(
    tracker: MlflowTracker, compression: Compression, run_id: str, data: TrainingData, folder: Path
) -> list[ModelRow]:
    """Original and pruned network, each in float32 and in 8 bits, on the validation split.

    `folder` becomes the package of the pruned one, its 8-bit form included; the table becomes an artifact of its run.
    """
    validation = data.validation.on(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        original = Path(name) / MODEL
        export.export_onnx(compression.original, original)
        with find_model(tracker.home, tracker.uri, run_id) as model:
            package(tracker, run_id, model.folder, folder, images=validation.images)
        recipes = {"original": (compression.original.metadata.recipe, original)}
        recipes["pruned"] = (compression.recipe, folder / MODEL)
        models: dict[str, tuple[Recipe, Path]] = {}
        for title, (recipe, path) in recipes.items():
            quantised = path.with_name(QUANTISED_MODEL)
            export.quantise(path, quantised, export.calibration_pixels(data))
            models |= {title: (recipe, path), f"{title}, 8 bits": (recipe, quantised)}
        rows = _rows(models, validation, data.image_size, len(data.classes))
    table = pd.DataFrame([asdict(row) for row in rows])
    tracker.client.log_text(run_id, table.to_csv(index=False), TABLE)
    return rows


def _rows(models: dict[str, tuple[Recipe, Path]], validation: Split, size: int, num_classes: int) -> list[ModelRow]:
    """One for each name -> (recipe, ONNX file)."""
    latencies_ms = export.latencies_ms([(path, size) for _, path in models.values()])
    return [
        ModelRow(
            model=title,
            accuracy=score(export.predict(export.session(path), validation.images), validation.labels.numpy()).accuracy,
            parameters=num_parameters(build_network(recipe.model, num_classes, size, seed=0)),
            flop=prediction_flop(recipe.model, num_classes, size),
            latency_ms=latency_ms,
            bytes=path.stat().st_size,
        )
        for (title, (recipe, path)), latency_ms in zip(models.items(), latencies_ms, strict=True)
    ]
