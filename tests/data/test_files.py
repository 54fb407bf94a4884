"""The images of a listing are read, and looked at."""

from pathlib import Path

import pytest
from data_cases import make_pets
from PIL import Image

from pipeline.data.files import Sizes, look
from pipeline.data.folder import read_folder


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return make_pets(tmp_path)


def test_sizes_are_looked_at_as_images_are_shown(pets: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    for index in range(9):
        Image.new("RGB", (30, 20)).save(pets / "train" / "cat" / f"turned{index}.jpg", exif=turned)
    (pets / "train" / "cat" / "broken.png").write_bytes(b"")
    assert look(read_folder(pets)) == Sizes(14, 20, 30, 1.5)
