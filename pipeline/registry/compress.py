"""A finished run's network made narrower, and what that costs and saves.

Either it is pruned, without its least important channels, and trained on for a while; or it is distilled: a network of the
same narrow shape learns from the original, from random weights and by the original's recipe.
"""

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

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
from pipeline.recipe import Recipe
from pipeline.registry import export, initial_weights
from pipeline.registry.finals import check_same_data
from pipeline.registry.package import MODEL, QUANTISED_MODEL, package
from pipeline.sections.curriculum import Curriculum
from pipeline.tracking import queries, recovery
from pipeline.tracking.models import find_model, keep_model
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker
from pipeline.training.execution import executable_on
from pipeline.training.loop import EpochReport

EPOCHS_SHARE = 0.25  # of the original's, by default
RATE_SHARE = 0.3  # of the original's learning rates
TABLE = "compression.csv"  # among the run's artifacts

Method = Literal["pruned", "distilled"]


@dataclass(frozen=True)
class Compression:
    """What is to be trained: a narrower network of a finished run, pruned or distilled from it."""

    parent: StoredRun
    original: Classifier  # on the CPU
    recipe: Recipe
    sparsity: float
    method: Method

    @property
    def name(self) -> str:
        """Of its run."""
        return f"{self.parent.info.run_name} ({self.method}, sparsity {self.sparsity:g})"


@dataclass(frozen=True)
class ModelRow:
    """One ONNX model beside others: its validation accuracy in [0, 1], and what it costs."""

    model: str
    accuracy: float
    parameters: int
    flop: int  # of one prediction
    latency_ms: float  # one image, onnxruntime, one thread
    bytes: int


def plan_compressions(
    tracker: MlflowTracker,
    original: Classifier,
    sparsity: float,
    epochs: int | None,
    distil: bool,
    device: torch.device,
) -> list[Compression]:
    """The pruned network's recipe, and the distilled one's of the same shape if that is wanted.

    The files that they start or learn from are kept. `epochs`, of the pruned one, default to EPOCHS_SHARE of the original's.
    UserError where the network can't be pruned, or not so far, or its recipe is for no training from random weights.
    """
    metadata, parent = original.metadata, queries.find_run(tracker, original.metadata.run_id)
    if metadata.members:
        raise UserError(
            f"run {metadata.run_id}", "is an ensemble, which has no recipe to train on by", "compress a member"
        )
    if distil and metadata.recipe.transfer.weights_file:
        rule = "started from trained weights, so its recipe doesn't suit the random ones of a distilled network"
        raise UserError(
            f"run {metadata.run_id}", rule, "without `--distil` it is pruned only; or distil the run that it is made of"
        )
    narrow = narrower(metadata.recipe, sparsity, len(metadata.classes))
    changes: dict[Method, dict[str, Any]] = {"pruned": _pruned(tracker, original, narrow, epochs)}
    if distil:
        changes["distilled"] = {"loss.teacher": str(keep_model(tracker.home, tracker.uri, metadata.run_id))}
    return [
        Compression(parent, original, executable_on(narrow.changed(fields), device), sparsity, method)
        for method, fields in changes.items()
    ]


def _pruned(tracker: MlflowTracker, original: Classifier, narrow: Recipe, epochs: int | None) -> dict[str, Any]:
    """What the pruned network's recipe changes in that of the narrow network; its initial weights are kept."""
    network = pruned(original.network, narrow, len(original.metadata.classes))
    return {
        **{name: rate * RATE_SHARE for name, rate in narrow.rates.items()},
        "training.epochs": epochs or math.ceil(narrow.training.epochs * EPOCHS_SHARE),
        "transfer.weights": initial_weights.keep(network, tracker.home),
        "transfer.frozen_epochs": 0,
        "transfer.frozen_share": 0.0,
        **{f"curriculum.{field}": value for field, value in Curriculum().model_dump().items()},  # it knows the images
    }


def finished_run(tracker: MlflowTracker, compression: Compression) -> str | None:
    """The run that trained just this already, if there is one; a kill may have kept from it what it started from."""
    info = compression.parent.info
    query = f"tags.compresses = '{info.run_id}' and tags.state = '{State.FINISHED}'"
    for run in tracker.store.search([info.experiment_id], query):
        if RunTags.of(run).recipe_digest == compression.recipe.digest():
            initial_weights.attach(tracker, run.info.run_id, compression.recipe)
            return str(run.info.run_id)
    return None


def train(
    tracker: MlflowTracker,
    compression: Compression,
    data: TrainingData,
    device: torch.device,
    on_epoch: Callable[[EpochReport], None] = lambda report: None,
) -> experiment.Outcome:
    """Train the narrower network under a run of its own, a child of the original's, with the role `compressed`.

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
        method=compression.method,
        pruner=LIBRARY if compression.method == "pruned" else None,
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
    tracker: MlflowTracker, compressions: Mapping[str, Compression], data: TrainingData, exports: Path
) -> list[ModelRow]:
    """The original and its compressions, run -> what it trained, each in float32 and in 8 bits, on the validation split.

    The folder `exports / run` becomes the package of each, its 8-bit form included; the table an artifact of each run.
    """
    validation = data.validation.on(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        original = next(iter(compressions.values())).original
        export.export_onnx(original, path := Path(name) / MODEL)
        files = {"original": (original.metadata.recipe, path)}
        for run_id, compression in compressions.items():
            folder = exports / run_id
            with find_model(tracker.home, tracker.uri, run_id) as model:
                package(tracker, run_id, model.folder, folder, images=validation.images)
            files[compression.method] = (compression.recipe, folder / MODEL)
        models: dict[str, tuple[Recipe, Path]] = {}
        for title, (recipe, path) in files.items():
            quantised = path.with_name(QUANTISED_MODEL)
            export.quantise(path, quantised, export.calibration_pixels(data))
            models |= {title: (recipe, path), f"{title}, 8 bits": (recipe, quantised)}
        rows = _rows(models, validation, data.image_size, len(data.classes))
    table = pd.DataFrame([asdict(row) for row in rows]).to_csv(index=False)
    for run_id in compressions:
        tracker.client.log_text(run_id, table, TABLE)
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
