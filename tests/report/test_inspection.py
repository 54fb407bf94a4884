"""What an inspection finds in a small folder with one fault of each kind."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Trained
from PIL import Image

from pipeline.data.datasets import load
from pipeline.report.inspection import Inspection, inspect
from pipeline.report.inspection_page import findings, inspection_page
from pipeline.sections.data import Data
from pipeline.tracking.tracker import MlflowTracker


def scene(seed: int) -> Image.Image:
    """Smooth random colours, as a photo has."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((40, 30), Image.Resampling.BICUBIC)


def make_photos(root: Path) -> Path:
    """Two classes of ten training images, three validation and test images each; faults as the tests name them."""
    for split, count in (("train", 10), ("val", 3), ("test", 3)):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                scene(100 * label + 10 * len(split) + number).save(root / split / name / f"{number}.png")
    train, test = root / "train", root / "test"
    shutil.copy(test / "cat" / "0.png", train / "cat" / "sealed.png")
    Image.open(test / "cat" / "1.png").save(train / "cat" / "sealed.jpg", quality=80)
    Image.open(train / "dog" / "1.png").resize((44, 33)).save(root / "val" / "dog" / "same.png")
    shutil.copy(train / "dog" / "2.png", train / "cat" / "other.png")
    shutil.copy(train / "dog" / "3.png", train / "dog" / "twice.png")
    (train / "dog" / "broken.jpg").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("photos") / "photos")


@pytest.fixture(scope="module")
def found(photos: Path) -> Inspection:
    return inspect(Data(dataset=str(photos)), Path("nowhere"), photos.parent / "mlruns", None)


def test_duplicates_come_by_what_they_spoil(found: Inspection) -> None:
    names = [{str(found.survey.names[row]) for row in one.rows} for one in found.duplicates]
    assert names == [
        {"train/cat/sealed.png", "test/cat/0.png"},
        {"train/cat/sealed.jpg", "test/cat/1.png"},
        {"train/dog/1.png", "val/dog/same.png"},
        {"train/cat/other.png", "train/dog/2.png"},
        {"train/dog/3.png", "train/dog/twice.png"},
    ]
    assert [one.severity for one in found.duplicates] == [0, 0, 1, 2, 3]
    assert [one.is_exact for one in found.duplicates] == [True, False, False, True, True]


def equal(count: int) -> str:
    return f"of which {count} are equal byte for byte to another"


def test_counts_hold_every_file(found: Inspection) -> None:
    assert {split: counts.tolist() for split, counts in found.counts.items()} == {
        "train": [13, 12],
        "val": [3, 4],
        "test": [3, 3],
    }
    assert found.lines() == [
        f"2 pictures more than once in the test split and in what is trained on: 4 images, {equal(2)}",
        f"1 picture more than once in training and validation: 2 images, {equal(0)}",
        f"1 picture more than once under two classes: 2 images, {equal(2)}",
        f"1 picture more than once in one class and split: 2 images, {equal(2)}",
        "1 file can't be read",
    ]
    assert found.notes[-1] == "a study leaves out 1 image of these, equal byte for byte to test images"


def test_an_exact_copy_is_exact_though_its_set_has_a_near_one(photos: Path, tmp_path: Path) -> None:
    root = shutil.copytree(photos, tmp_path / "photos")
    Image.open(root / "test" / "cat" / "0.png").save(root / "train" / "cat" / "sealed again.jpg", quality=95)
    found = inspect(Data(dataset=str(root)), Path("nowhere"), tmp_path / "mlruns", None)
    assert found.lines()[0].endswith(f"trained on: 5 images, {equal(2)}")
    table = findings(found)
    kinds = dict(zip(table["image"], table["finding"], strict=True))
    names = ("train/cat/sealed.png", "test/cat/0.png", "train/cat/sealed again.jpg")
    assert [kinds[name] for name in names] == ["exact duplicate", "exact duplicate", "near duplicate"]
    assert "nearly the same, 2 of them with equal bytes" in inspection_page(found, "photos.csv")


def test_16_bit_images_that_come_out_nearly_black_are_counted(photos: Path, tmp_path: Path) -> None:
    root = shutil.copytree(photos, tmp_path / "photos")
    for number, most in enumerate((2**12, 2**14, 2**16)):
        values = np.random.default_rng(number).integers(0, most, (30, 40), dtype=np.uint16)
        values[0, 0] = most - 1
        Image.fromarray(values).save(root / "train" / "dog" / f"deep{number}.png")
    lines = inspect(Data(dataset=str(root)), Path("nowhere"), tmp_path / "mlruns", None).lines()
    assert [line for line in lines if "16-bit" in line] == [
        "2 16-bit images with less than a quarter of the range, so nearly black to a network: scale to 0 to 65,535 first, "
        "all by the same factor"
    ]


def test_pictures_are_those_of_their_rows(photos: Path, found: Inspection) -> None:
    row = found.survey.names.tolist().index("val/dog/same.png")
    middle = np.asarray(Image.open(photos / "val" / "dog" / "same.png"))[16, 22].astype(int)
    assert np.abs(found.picture(row, 44)[:, 22, 22].astype(int) - middle).max() < 25


def test_nothing_is_written_and_the_digest_is_that_of_runs(
    photos: Path, monkeypatch: pytest.MonkeyPatch, trained: Trained
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("pipeline.report.inspection.find_suspects", lambda tracker, digest: asked.append(digest))
    about = Data(dataset=str(photos), corrupt="skip", image_size=8)
    home = photos.parent / "mlruns"
    for duplicates in ("drop", "keep"):
        chosen = about.model_copy(update={"duplicates": duplicates})
        inspect(chosen, Path("nowhere"), home, MlflowTracker(trained.home))
        assert asked[-1] == load(chosen, Path("nowhere")).digest
    assert asked[0] != asked[1] and not home.exists()


def test_digits_are_divided_as_studies_do_and_suspects_are_rows(trained: Trained) -> None:
    found = inspect(Data(dataset="digits"), Path("nowhere"), trained.home, MlflowTracker(trained.home))
    assert [counts.sum() for counts in found.counts.values()] == [1294, 144, 359]
    assert found.suspects and found.suspects.num_images == 144
    assert set(found.survey.splits[found.suspect_rows]) <= {"val"}
    assert not found.duplicates
    suspected = f"{len(found.suspect_rows)} suspected wrong label"
    assert found.lines()[0].startswith(suspected if len(found.suspect_rows) else "nothing was found")


def test_too_few_images_for_a_validation_split_is_a_note(tmp_path: Path) -> None:
    for number in range(2):
        for name in ("cat", "dog"):
            (tmp_path / name).mkdir(exist_ok=True)
            scene(number + 10 * len(name) * (name == "dog")).save(tmp_path / name / f"{number}.png")
    about = Data(dataset=str(tmp_path), test_fraction=0)
    notes = inspect(about, Path("nowhere"), tmp_path / "mlruns", None).notes
    assert len(notes) == 1 and notes[0].startswith(
        "a study will refuse it: data.validation_fraction = 0.1: gives 0 of 4"
    )
