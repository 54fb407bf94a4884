"""Shared by the tests of training."""

from dataclasses import replace
from pathlib import Path

from pipeline.data.datasets import Split
from pipeline.data.images import resized
from pipeline.data.prepare import TrainingData
from pipeline.models.build import build_network
from pipeline.recipe import Recipe
from pipeline.sections.data import Form
from pipeline.training.checkpoints import save_checkpoint


def at_size(data: TrainingData, size: int) -> TrainingData:
    """The same images at another size, for networks that take no small ones."""
    train, validation = (Split(resized(s.images, Form(size)), s.labels) for s in (data.train, data.validation))
    return replace(data, train=train, validation=validation)


def save_model(folder: Path, recipe: Recipe, data: TrainingData) -> Path:
    """The folder of a model that learnt nothing, with what of its record a teacher needs."""
    facts = {
        "recipe": recipe.model_dump(mode="json"),
        "data_digest": data.digest,
        "split_digest": data.split_digest,
        "classes": data.classes,
        "mean": data.mean.tolist(),
        "std": data.std.tolist(),
        "run_id": "f" * 32,
    }
    network = build_network(recipe.model, len(data.classes), recipe.data.image_size, recipe.training.seed)
    save_checkpoint(folder, network, None, facts)
    return folder
