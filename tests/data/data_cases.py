"""Shared by the tests of data sets."""

from pathlib import Path

import pytest
from PIL import Image

from pipeline.data.datasets import load
from pipeline.errors import UserError
from pipeline.sections.data import Data

NO_DATA_DIR = Path("/nonexistent")


def about(dataset: object, image_size: int = 8, **fields: object) -> Data:
    """The recipe's section of a data set all of whose images may be used."""
    return Data.model_validate({"dataset": str(dataset), "image_size": image_size, "test_fraction": 0} | fields)


def lines_of(error: type[UserError], dataset: str, image_size: int = 8, data_dir: Path = NO_DATA_DIR) -> list[str]:
    """What `load` says where it raises an `error` of just this class."""
    with pytest.raises(UserError) as caught:
        load(about(dataset, image_size), data_dir)
    assert type(caught.value) is error
    return caught.value.lines


def add_image(path: Path, colour: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 14), (colour, 0, 255 - colour)).save(path)


def make_pets(root: Path) -> Path:
    """A data set in the folder `root`: two cats, three dogs; the colours count up in the order of the names."""
    names = ["cat/1.png", "cat/2.JPG", "dog/1.bmp", "dog/2.webp", "dog/more/0.tiff"]
    for index, name in enumerate(names):
        add_image(root / "train" / name, 20 * index)
    return root
