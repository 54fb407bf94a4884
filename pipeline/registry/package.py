"""A model as a folder that others can use: an MLflow model with nothing in it that is run as code.

model.onnx (see export.py) is what is served; weights.safetensors and checkpoint.json are the checkpoint that it was made
of, which `predict` reads; card.md, recipe.json and evidence.json are for people. MLmodel, requirements.txt, conda.yaml and
python_env.yaml are MLflow's.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlflow.onnx
import numpy as np
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec
from torch import Tensor

from pipeline.data.mapped import MappedImages
from pipeline.errors import UserError
from pipeline.inference.classifier import Classifier, ModelMetadata
from pipeline.registry import export
from pipeline.registry.card import ModelCosts, description, model_card
from pipeline.registry.ledger import VerdictEvidence
from pipeline.tracking.models import digests
from pipeline.tracking.tracker import MlflowTracker
from pipeline.training.checkpoints import PLAIN_WEIGHTS, RECORD, WEIGHTS

MODEL, QUANTISED_MODEL = "model.onnx", "model.int8.onnx"
CARD, EVIDENCE, RECIPE = "card.md", "evidence.json", "recipe.json"
PREDICTIONS = "predictions.parquet"
_NEEDS = ("mlflow", "onnx", "onnxruntime", "numpy")
_OF_MLFLOW = ("MLmodel", "requirements.txt", "conda.yaml", "python_env.yaml")
_FILES = frozenset({MODEL, QUANTISED_MODEL, CARD, EVIDENCE, RECIPE, RECORD, WEIGHTS, PLAIN_WEIGHTS, *_OF_MLFLOW})


@dataclass(frozen=True)
class Package:
    """A packed model, and what is to be known of it before it is registered."""

    folder: Path  # an MLflow model, complete
    sha256: dict[str, str]  # of every file, by its name relative to the folder
    card: str  # Markdown, as much of card.md as the registry's description holds
    bytes: int  # of model.onnx
    latency_ms: float  # one image, onnxruntime, one thread, median
    difference: float | None  # from torch in probability, the largest on the images that were given


def package_place(folder: Path) -> Path:
    """Where a package of this name lies, links followed; to be called before the work is done.

    UserError where nothing can be made there, or it holds what no package has: replacing it would delete that.
    """
    place = Path(os.path.realpath(folder))
    parent = next(each for each in (place, *place.parents) if each.exists())
    if not parent.is_dir() or not os.access(parent if parent != place else place.parent, os.W_OK):
        raise UserError(str(folder), "no folder can be made there", "name one in a folder of yours")
    files = {entry.name: entry.is_file() for entry in os.scandir(place)} if parent == place else {}
    is_package = files.get(RECORD, False)
    if others := sorted(name for name, is_file in files.items() if not (is_package and is_file and name in _FILES)):
        rule = f"holds {others[0]}, which is of no exported model, so it is not replaced"
        raise UserError(str(folder), rule, "name a new folder, or move that away")
    return place


def package(
    tracker: MlflowTracker | None,
    run_id: str,
    checkpoint: Path,
    folder: Path,
    evidence: VerdictEvidence | None = None,
    onnx_file: Path | None = None,
    images: Tensor | MappedImages | None = None,
) -> Package:
    """Pack the checkpoint of a run into `folder`, which is made, or replaced where it holds an earlier package.

    `checkpoint` is a checkpoint's folder, or an earlier package, whose card and evidence are kept as they are: then no
    `tracker` is needed. `evidence` is the gate's verdict, which the card shows and evidence.json keeps. `onnx_file` is
    the model's where it was exported already: it is packed byte for byte. On `images`, uint8 (N, 3, S, S), the ONNX
    model is compared with torch. The folder is complete or as it was; a kill between the two moves that replace it leaves
    none, and both copies beside it, in `.<name>.*/`. PromotionRefused where its probabilities are not torch's; UserError
    where `package_place` has one, it can't be written, or the run's predictions can't be read.
    """
    place = package_place(folder)
    classifier = Classifier.load(checkpoint, torch.device("cpu"))
    with _beside(place, folder) as name:
        new = Path(name) / "new"
        model = Path(name) / MODEL
        if onnx_file:
            shutil.copyfile(onnx_file, model)
        else:
            export.export_onnx(classifier, model)
        difference = None if images is None else export.check(classifier, model, images)
        _save_model(classifier, model, new)
        latency_ms = export.latency_ms(new / MODEL, classifier.image_size)
        for file in (RECORD, WEIGHTS, PLAIN_WEIGHTS):
            if (checkpoint / file).exists():
                shutil.copyfile(checkpoint / file, new / file)
        (new / RECIPE).write_text(classifier.metadata.recipe.to_json() + "\n", encoding="utf-8")
        costs = ModelCosts(latency_ms, (new / MODEL).stat().st_size)
        if (checkpoint / CARD).exists():
            for kept in filter(Path.exists, (checkpoint / CARD, checkpoint / EVIDENCE)):
                shutil.copyfile(kept, new / kept.name)
        else:
            card = _card(tracker, run_id, classifier.metadata, costs, evidence)
            (new / CARD).write_text(card, encoding="utf-8")
            if evidence:
                (new / EVIDENCE).write_text(evidence.model_dump_json(indent=2) + "\n", encoding="utf-8")
        card = (new / CARD).read_text(encoding="utf-8")
        if place.exists():
            os.replace(place, Path(name) / "old")
        os.replace(new, place)
    return Package(folder, digests(folder), description(card), costs.bytes, latency_ms, difference)


@contextlib.contextmanager
def _beside(place: Path, folder: Path) -> Iterator[str]:
    """A temporary folder beside `place`, from which a move is one step; UserError, about `folder`, where a write fails."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as name:
            yield name
    except OSError as error:
        raise UserError(str(folder), f"can't be written: {error.strerror or error}") from None


def _save_model(classifier: Classifier, path: Path, folder: Path) -> None:
    """MLflow's files around model.onnx."""
    import onnx

    metadata, size = classifier.metadata, classifier.image_size
    images = Schema([TensorSpec(np.dtype(np.uint8), (-1, size, size, 3), "images")])
    probabilities = Schema([TensorSpec(np.dtype(np.float32), (-1, len(metadata.classes)), "probabilities")])
    mlflow.onnx.save_model(
        onnx.load(path),
        str(folder),
        signature=ModelSignature(images, probabilities),
        pip_requirements=[f"{name}=={version(name)}" for name in _NEEDS],
        onnx_execution_providers=["CPUExecutionProvider"],
        metadata={
            "classes": list(metadata.classes),
            "run_id": metadata.run_id,
            "recipe_digest": metadata.recipe_digest,
            "geometry": metadata.recipe.data.form.geometry,
        },
        save_as_external_data=False,
    )
    os.replace(path, folder / MODEL)  # MLflow wrote it anew


def _card(
    tracker: MlflowTracker | None,
    run_id: str,
    metadata: ModelMetadata,
    costs: ModelCosts,
    evidence: VerdictEvidence | None,
) -> str:
    remedy = "`--tracking-uri` says where it is"
    if tracker is None:
        raise UserError(f"run {run_id}", "the numbers of its card can't be read: there is no tracking store", remedy)
    with tempfile.TemporaryDirectory() as name:
        try:
            run = tracker.client.get_run(run_id)
            predictions = tracker.client.download_artifacts(run_id, PREDICTIONS, name)
        except (MlflowException, OSError) as error:
            reason = str(error).splitlines()[0]
            rule = f"the numbers of its card can't be read ({reason})"
            raise UserError(f"run {run_id}", rule, remedy) from None
        return model_card(metadata, run, Path(predictions), costs, evidence)
