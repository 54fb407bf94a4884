"""A survey: sizes as shown, kinds of files, damage, fingerprints."""

from pathlib import Path

import numpy as np
import pytest
import torch
from data_cases import add_image, make_pets
from PIL import Image

from pipeline.data.duplicates import find_duplicates
from pipeline.data.folder import read_folder
from pipeline.data.survey import Survey, survey_files, survey_pixels


@pytest.fixture
def found(tmp_path: Path) -> Survey:
    root = make_pets(tmp_path / "pets")
    (root / "train" / "cat" / "1.png").write_bytes(b"")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("L", (30, 20)).save(root / "train" / "dog" / "turned.jpg", exif=turned)
    add_image(root / "val" / "dog" / "1.png", 40)
    Image.new("RGB", (12, 16), "red").save(root / "val" / "dog" / "2.png", exif=b"Exif\0\0no EXIF at all")
    return survey_files(read_folder(root))


def test_files_are_surveyed_in_their_order(found: Survey) -> None:
    names = ["cat/2.JPG", "dog/1.bmp", "dog/2.webp", "dog/turned.jpg", "dog/more/0.tiff"]
    assert found.names.tolist() == [*(f"train/{name}" for name in names), "val/dog/1.png", "val/dog/2.png"]
    assert found.labels.tolist() == [0, 1, 1, 1, 1, 1, 1]
    assert found.splits.tolist() == ["train"] * 5 + ["val"] * 2
    assert found.kinds.tolist() == ["JPEG RGB", "BMP RGB", "WEBP RGB", "JPEG L", "TIFF RGB", *["PNG RGB"] * 2]
    assert found.sizes.tolist() == [[10, 14]] * 3 + [[20, 30]] + [[10, 14]] * 2 + [[12, 16]]
    assert found.unreadable == (("train/cat/1.png", 0, "train", "empty file"),)


def test_fingerprints_belong_to_their_images(found: Survey) -> None:
    assert [one.tolist() for one in find_duplicates(found.prints).sets()] == [[1, 5]], "a bitmap as PNG, of one colour"
    assert len(set(found.prints.digests)) == 7


def test_pixels_are_surveyed_alike() -> None:
    images = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    one = survey_pixels(images, torch.tensor([0, 1, 1]), "train")
    both = one.joined(survey_pixels(images[:1], torch.tensor([1]), "test"))
    assert both.names.tolist() == ["no. 0", "no. 1", "no. 2", "no. 0"]
    assert both.splits.tolist() == ["train", "train", "train", "test"]
    assert both.sizes.tolist() == [[16, 16]] * 4
    (same,) = find_duplicates(both.prints).sets()
    assert same.tolist() == [0, 3] and both.prints.digests[0] == both.prints.digests[3]
    assert both.with_splits(np.array(["val"] * 4)).splits.tolist() == ["val"] * 4
