"""The images of a listing are read, and looked at."""

from pathlib import Path

import pytest
from data_cases import make_pets
from PIL import Image

from pipeline.data.files import Sizes, look, read
from pipeline.data.folder import read_folder
from pipeline.data.manifest import read_manifest
from pipeline.sections.data import Data, Form


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return make_pets(tmp_path)


def test_digest_changes_with_given_splits_and_groups_of_the_same_images(pets: Path) -> None:
    names = sorted(str(path.relative_to(pets)) for path in (pets / "train").rglob("*.*"))
    seen = []
    for split, group in (("", ""), (",split", ""), ("", ",group"), (",split", ",group"), ("", ",group")):
        rows = [
            f"{name},{Path(name).parts[1]}"
            + (",val" if number == 4 else ",train") * bool(split)
            + f",g{number}" * bool(group)
            for number, name in enumerate(names)
        ]
        (pets / "pets.csv").write_text("\n".join([f"path,label{split}{group}", *rows]))
        seen.append(read(read_manifest(pets / "pets.csv", Data().column_names), Form(8), Data()).labelled.digest)
    assert len(set(seen)) == 4 and seen[2] == seen[4]


def test_sizes_are_looked_at_as_images_are_shown(pets: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    for index in range(9):
        Image.new("RGB", (30, 20)).save(pets / "train" / "cat" / f"turned{index}.jpg", exif=turned)
    (pets / "train" / "cat" / "broken.png").write_bytes(b"")
    assert look(read_folder(pets)) == Sizes(14, 20, 30, 1.5)
