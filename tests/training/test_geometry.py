"""Sets made for the purpose: only a geometry that keeps what the classes differ in can learn them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.datasets import load
from pipeline.data.prepare import prepare
from pipeline.recipe import parse_recipe
from pipeline.training.loop import train

PER_CLASS, SIZE = 60, 16
CHANCE, LEARNT = 0.6, 0.9  # of three classes
Draw = Callable[[np.random.Generator], np.ndarray]


def shaped(width: int, height: int) -> Draw:
    """The class is the aspect: nine colours of a square are stretched, so a squashed image shows that square again."""

    def draw(random: np.random.Generator) -> np.ndarray:
        pattern = Image.fromarray(random.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        return np.asarray(pattern.resize((width, height), Image.Resampling.BICUBIC))

    return draw


def marked(place: slice) -> Draw:
    """The class is where at the border of an image of 2:1 a white mark lies."""

    def draw(random: np.random.Generator) -> np.ndarray:
        image = random.integers(0, 128, (SIZE, 2 * SIZE, 3), dtype=np.uint8)
        image[4:12, place] = 255
        return image

    return draw


SETS: dict[str, dict[str, Draw]] = {
    "aspect": {"wide": shaped(48, 16), "square": shaped(32, 32), "tall": shaped(16, 48)},
    "border": {"left": marked(slice(0, 6)), "none": marked(slice(0, 0)), "right": marked(slice(-6, None))},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, random = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    for name, classes in SETS.items():
        for label, draw in classes.items():
            (folder := root / name / "train" / label).mkdir(parents=True)
            for index in range(PER_CLASS):
                Image.fromarray(draw(random)).save(folder / f"{index}.png")
    return root


@pytest.mark.parametrize(
    ("name", "geometry", "is_learnt"),
    [
        ("aspect", "pad", True),
        ("aspect", "squash", False),
        ("border", "pad", True),
        ("border", "squash", True),
        ("border", "crop", False),
    ],
)
def test_geometry_decides_what_can_be_learnt(folders: Path, name: str, geometry: str, is_learnt: bool) -> None:
    recipe = parse_recipe(
        {
            "data": {
                "dataset": str(folders / name),
                "image_size": SIZE,
                "geometry": geometry,
                "validation_fraction": 0.4,
                "test_fraction": 0,
            },
            "model": {"network": "baseline", "widths": [8, 16], "hidden": 16},
            "augmentation": {"crop_padding": 0, "horizontal_flip": 0},
            "optimizer": {"name": "adam", "lr": 0.01},
            "training": {"epochs": 15, "batch_size": 27, "precision": "fp32"},
        }
    )
    data = prepare(load(recipe.data, folders), recipe.data, torch.device("cpu"))
    accuracy = train(recipe, data, torch.device("cpu")).history[-1].metrics["val/accuracy"]
    assert accuracy > LEARNT if is_learnt else accuracy < CHANCE, accuracy
