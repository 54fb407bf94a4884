"""Folders of images: their layout, and a remedy for each thing that can be wrong."""

import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from data_cases import NO_DATA_DIR, about, add_image, lines_of, make_pets
from torchvision.datasets import ImageFolder

from pipeline.data import images
from pipeline.data.datasets import load
from pipeline.data.folder import read_folder
from pipeline.data.prepare import prepare
from pipeline.errors import DataError, UserError


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return make_pets(tmp_path / "My Pets!")


def test_folder_orders_classes_and_images_by_name(pets: Path) -> None:
    data = load(about(str(pets), 12), NO_DATA_DIR)
    assert (data.name, data.classes) == (f"my-pets-{data.digest[:6]}", ("cat", "dog"))
    assert data.source == str(pets)
    assert data.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert data.train.labels.dtype == torch.int64
    assert data.train.images.shape == (5, 3, 12, 12)
    assert data.train.images.dtype == torch.uint8
    red = data.train.images[:, 0].float().mean(dim=(1, 2))
    assert torch.allclose(red, torch.tensor([0.0, 20, 40, 60, 80]), atol=3)


def test_folder_is_read_as_by_torchvision(pets: Path) -> None:
    theirs, ours = ImageFolder(pets / "train"), read_folder(pets)
    assert list(zip(ours.files, ours.labels, strict=True)) == theirs.samples
    assert list(ours.classes) == theirs.classes


def test_classes_may_lie_in_the_folder_itself(pets: Path) -> None:
    digest = load(about(pets), NO_DATA_DIR).digest
    assert load(about(pets / "train"), NO_DATA_DIR).digest == digest, "the same images and classes, the same data set"


@pytest.mark.parametrize("name", ["val", "Valid", "VALIDATION", "dev", "eval"])
def test_validation_folder_is_the_validation_split(name: str, pets: Path) -> None:
    before = load(about(pets), NO_DATA_DIR).digest
    add_image(pets / name / "dog" / "1.png", 99)
    data = prepare(load(about(pets), NO_DATA_DIR), about(pets), torch.device("cpu"))
    assert (data.validation_ids.tolist(), data.validation.labels.tolist(), len(data.train.labels)) == ([5], [1], 5)
    assert data.digest != before
    assert data.listed.lines() == ["My Pets! has a validation split of its own, 1 images: none is drawn"]
    add_image(pets / name / "cow" / "1.png")
    assert lines_of(DataError, pets) == [f"{pets}/{name}/cow: no such class in {pets}/train; rename or remove it"]


def test_splits_may_be_called_training_and_testing(pets: Path) -> None:
    digest = load(about(pets), NO_DATA_DIR).digest
    add_image(pets / "Testing" / "dog" / "1.png", 99)
    (pets / "train").rename(pets / "Training")
    data = load(about(pets), NO_DATA_DIR)
    assert (data.digest, data.classes) == (digest, ("cat", "dog")) and data.listed.listing.has("test")


@pytest.mark.parametrize(
    "names", [("seg_train/seg_train", "seg_test/seg_test"), ("training_set", "test_set"), ("fold 1", "fold 2")]
)
def test_folders_that_look_like_splits_are_no_classes(names: tuple[str, str], pets: Path) -> None:
    for name in names:
        shutil.copytree(pets / "train", pets / name)
    shutil.rmtree(pets / "train")
    first, second = sorted(name.partition("/")[0] for name in names)
    (line,) = lines_of(DataError, pets)
    assert line == (
        f"{pets}: its folders look like splits, not classes: {first}, {second}; rename them to train and test, with a "
        f"folder for each class in them; or, if they are classes, move them into {pets}/train"
    )
    (pets / "train").mkdir()
    for name in (first, second):
        (pets / name).rename(pets / "train" / name)
    assert load(about(pets), NO_DATA_DIR).classes == (first, second)


def test_classes_with_subfolders_or_a_word_of_a_split_are_classes(tmp_path: Path) -> None:
    names = ["train station/images/1.png", "train station/old/2.png", "test tube/images/1.png", "test tube/new/2.png"]
    for name in names:
        add_image(tmp_path / name)
    assert load(about(tmp_path), NO_DATA_DIR).classes == ("test tube", "train station")


def test_two_folders_of_one_split_are_refused(pets: Path) -> None:
    for name in ("val", "valid"):
        (pets / name).mkdir()
    assert lines_of(DataError, pets) == [f"{pets}: has val and valid, which mean the same; keep one of them"]


def test_class_called_train_is_told_from_the_split(pets: Path) -> None:
    shutil.move(pets / "train" / "dog", pets / "dog")
    (line,) = lines_of(DataError, pets)
    assert line.endswith("add a folder for each class, or rename it if it is one")


def test_hidden_files_and_other_files_are_ignored(pets: Path) -> None:
    before = load(about(str(pets), 12), NO_DATA_DIR).digest
    for name in ("cat/.hidden.png", "cat/._1.png", "cat/.cache/1.png", ".ipynb_checkpoints/1.png"):
        add_image(pets / "train" / name)
    for name in ("cat/Thumbs.db", "cat/more/.DS_Store", "__MACOSX/cat/1.png"):
        (pets / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (pets / "train" / name).touch()
    (pets / "train" / "cat" / "notes.TXT").write_text("not an image")
    (pets / "train" / "readme.png").write_text("in no class")
    (pets / "raw").mkdir()
    data = load(about(str(pets), 12), NO_DATA_DIR)
    assert data.digest == before
    assert data.listed.lines() == [
        f"left out of {pets}: 7 hidden or system, 1 .txt, 1 folders beside the splits, 1 in no class folder"
    ]


def test_jpegs_have_several_suffixes(pets: Path) -> None:
    for name in ("3.jfif", "4.JPE"):
        shutil.copy(pets / "train" / "cat" / "2.JPG", pets / "train" / "cat" / name)
    data = load(about(pets), NO_DATA_DIR)
    assert len(data.train.labels) == 7 and not data.listed.listing.left_out.total()


def test_links_are_followed_once_even_in_a_circle(pets: Path) -> None:
    (pets / "train" / "cat" / "circle").symlink_to(pets / "train" / "cat")
    add_image(pets / "elsewhere" / "1.png")
    add_image(pets / "elsewhere" / "2.png")
    (pets / "train" / "bird").symlink_to(pets / "elsewhere")
    (pets / "train" / "dog" / "also").symlink_to(pets / "elsewhere")
    data = load(about(str(pets), 12), NO_DATA_DIR)
    assert data.classes == ("bird", "cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 2]


def test_of_links_to_one_folder_the_first_counts(pets: Path) -> None:
    """Not the one that the file system lists first: names say which images are sealed."""
    for name in "hgfedcba":
        (pets / "train" / "dog" / name).symlink_to(pets / "train" / "dog" / "more")
    assert read_folder(pets).names[-1] == "train/dog/a/0.tiff"


@pytest.mark.parametrize("link", ["train/bird", "train/cat/more", "train/cat/3.png", "train"])
def test_link_out_of_the_folder_is_refused(link: str, pets: Path) -> None:
    private = pets.parent / "private"
    for name in ("1.png", "2.png", "a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        add_image(private / name)
    if link == "train":
        (pets / "train").rename(pets / "before")
    (pets / link).symlink_to(private / "1.png" if link.endswith(".png") else private)
    with pytest.raises(DataError, match=f"leads out of {re.escape(str(pets))}; copy the images into it"):
        load(about(str(pets), 12), NO_DATA_DIR)
    link_to_all = pets.parent / "all"
    link_to_all.symlink_to(pets)
    (pets / link).unlink()
    if link != "train":
        assert load(about(str(link_to_all), 12), NO_DATA_DIR).classes == ("cat", "dog"), (
            "the folder itself may be named by a link"
        )


def test_unreadable_class_folder_is_an_error(pets: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        root = Path(folder) / "pets"
        shutil.copytree(pets, root)
        Path(folder).chmod(0o755)
        closed = root / "train" / "dog" / "more"
        closed.chmod(0)
        is_root = os.geteuid() == 0  # who may read everything
        try:
            if is_root:
                os.seteuid(65534)
            assert lines_of(DataError, str(root)) == [f"{closed}: Permission denied"]
        finally:
            if is_root:
                os.seteuid(0)
            closed.chmod(0o755)


def test_all_broken_images_are_listed_at_once(pets: Path) -> None:
    (pets / "train" / "cat" / "2.JPG").write_bytes(b"")
    (pets / "train" / "dog" / "1.bmp").write_bytes(b"nothing")
    empty, text, count = lines_of(DataError, str(pets))
    assert empty == f"{pets}/train/cat/2.JPG: empty file"
    assert text.startswith(f"{pets}/train/dog/1.bmp: not a JPEG")
    assert count == "2 of 5 images can't be used; replace or remove them, or `--corrupt skip` leaves them out"


def test_at_most_twenty_broken_images_are_listed(pets: Path) -> None:
    for index in range(23):
        (pets / "train" / "cat" / f"x{index:02}.png").write_bytes(b"")
    lines = lines_of(DataError, str(pets))
    assert len(lines) == 22
    assert lines[19:] == [
        f"{pets}/train/cat/x19.png: empty file",
        "and 3 more",
        "23 of 28 images can't be used; replace or remove them, or `--corrupt skip` leaves them out",
    ]


def test_every_class_needs_two_images(pets: Path) -> None:
    (pets / "train" / "bird").mkdir()
    (pets / "train" / "bird" / "1.heic").touch()
    add_image(pets / "train" / "cow" / "1.png")
    end = "needs at least 2; add some (.jpg .jpeg .jpe .jfif .png .gif .webp .bmp .tif .tiff) or remove it"
    assert lines_of(DataError, str(pets)) == [
        f"{pets}/train/bird: holds 0 image(s), {end}",
        f"{pets}/train/cow: holds 1 image(s), {end}",
    ]


def test_folder_needs_train_and_two_classes(pets: Path) -> None:
    shutil.rmtree(pets / "train" / "dog")
    assert lines_of(DataError, str(pets)) == [
        f"{pets}/train: holds one class, needs at least 2; add a folder for each class"
    ]
    shutil.rmtree(pets / "train")
    assert lines_of(DataError, str(pets)) == [f"{pets}: holds no class, needs at least 2; add a folder for each class"]
    (pets / "test").mkdir()
    assert lines_of(DataError, str(pets)) == [
        f"{pets}: has no folder train; put the training images into {pets}/train/<class>/"
    ]


def test_test_images_stay_closed_but_their_classes_are_checked(pets: Path) -> None:
    (pets / "test" / "dog").mkdir(parents=True)
    (pets / "test" / "dog" / "1.png").write_bytes(b"would be refused if it were opened")
    assert len(load(about(str(pets), 8), NO_DATA_DIR).train.labels) == 5
    (pets / "test" / "dogs").mkdir()
    assert lines_of(DataError, str(pets)) == [
        f"{pets}/test/dogs: no such class in {pets}/train (did you mean dog?); rename or remove it"
    ]


def test_folder_with_too_many_pixels_is_refused(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 5 * 3 * 64**2)
    assert len(load(about(str(pets), 64), NO_DATA_DIR).train.labels) == 5
    assert lines_of(UserError, str(pets), 65)[0].startswith("data.image_size = 65: 5 images take")
