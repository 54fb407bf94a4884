"""Copies of test images don't train, and files that can't be read are left out where that was asked for."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from data_cases import NO_DATA_DIR, about, add_image, lines_of, make_pets

from pipeline.data.datasets import listed, load
from pipeline.data.exclusions import Excluded, excluded_table
from pipeline.data.prepare import prepare
from pipeline.errors import DataError


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Four cats and three dogs; a test image of each, the cat's a copy of train/cat/1.png under another name."""
    root = make_pets(tmp_path / "pets")
    for number in (3, 4):
        add_image(root / "train" / "cat" / f"{number}.png", 100 + number)
    add_image(root / "test" / "dog" / "9.png", 99)
    (root / "test" / "cat").mkdir()
    shutil.copy(root / "train" / "cat" / "1.png", root / "test" / "cat" / "same.png")
    return root


def test_copy_of_a_test_image_does_not_train(pets: Path) -> None:
    data = load(about(pets), NO_DATA_DIR)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert excluded_table(data.listed.excluded).to_dict("records") == [
        {"path": "train/cat/1.png", "reason": "copy of the test image test/cat/same.png"}
    ]
    line = "images that aren't used: 0 that can't be read, 1 that are in the test split, too"
    assert data.listed.lines() == [f"{line}; `inspect {pets}` shows them"]
    assert data.listed.listing.test_digest == listed(about(pets), None).listing.test_digest
    (pets / "train" / "cat" / "1.png").unlink()
    assert load(about(pets), NO_DATA_DIR).digest == data.digest, "as if it weren't there"


def test_names_that_are_not_utf_8_are_escaped_in_the_table() -> None:
    odd = os.fsdecode(b"caf\xe9.png")
    table = excluded_table([Excluded(f"cat/{odd}", f"copy of the test image {odd}")])
    assert table.to_csv(index=False).encode().decode().splitlines()[1] == (
        "cat/caf\\xe9.png,copy of the test image caf\\xe9.png"
    )


def test_copies_may_be_kept(pets: Path) -> None:
    data = load(about(pets, duplicates="keep"), NO_DATA_DIR)
    assert len(data.train.labels) == 7 and not data.listed.excluded
    assert data.listed.lines() == ["caution: 1 training image also in the test split; this flatters its scores"]


def test_only_files_of_equal_size_are_read(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.remove(pets / "test" / "cat" / "same.png")
    (pets / "test" / "dog" / "9.png").write_bytes(b"damaged, and of a size of its own")
    monkeypatch.setattr(
        "pipeline.data.exclusions.file_digests", lambda paths, skip: [] if not paths else pytest.fail("read")
    )
    assert len(load(about(pets), NO_DATA_DIR).train.labels) == 7


def test_class_that_is_left_with_too_little_is_refused(pets: Path) -> None:
    for name in ("2.JPG", "3.png"):
        shutil.copy(pets / "train" / "cat" / name, pets / "test" / "cat" / name)
    rule = "holds 1 image(s) besides those that are left out, needs at least 2"
    assert lines_of(DataError, pets) == [
        f"{pets}, class cat: {rule}; add some, or remove the class",
        "3 images are left out",
        "  train/cat/1.png: copy of the test image test/cat/same.png",
        "  train/cat/2.JPG: copy of the test image test/cat/2.JPG",
        "  train/cat/3.png: copy of the test image test/cat/3.png",
    ]


def test_unreadable_files_are_left_out_where_asked(pets: Path) -> None:
    (pets / "train" / "cat" / "3.png").write_bytes(b"")
    (pets / "train" / "dog" / "more" / "0.tiff").write_bytes(b"nothing")
    assert lines_of(DataError, pets)[-1].endswith("replace or remove them, or `--corrupt skip` leaves them out")
    data = load(about(pets, corrupt="skip"), NO_DATA_DIR)
    assert data.train.labels.tolist() == [0, 0, 1, 1]
    red = data.train.images[:, 0].float().mean(dim=(1, 2))
    assert torch.allclose(red, torch.tensor([20.0, 104, 40, 60]), atol=3), "each image with its own label"
    assert [one.name for one in data.listed.excluded] == ["train/cat/3.png", "train/dog/more/0.tiff", "train/cat/1.png"]
    assert "2 that can't be read, 1 that are in the test split, too" in data.listed.lines()[0]
    for name in ("3.png", "4.png"):
        (pets / "train" / "cat" / name).unlink()
    with pytest.raises(DataError, match="class cat: holds 1 image"):
        load(about(pets, corrupt="skip"), NO_DATA_DIR)


def test_missing_files_are_left_out_where_asked(pets: Path) -> None:
    """Rows of a manifest whose files are gone, to train on and to test on, and a link to nothing."""
    names = [str(file.relative_to(pets)) for file in sorted(pets.rglob("*.*"))]
    rows = [f"{name},{'dog' if 'dog' in name else 'cat'},{'test' if 'test' in name else 'train'}" for name in names]
    rows += ["train/cat/gone.png,cat,train", "test/dog/gone.png,dog,test", "test/cat/link.png,cat,test"]
    (pets / "test" / "cat" / "link.png").symlink_to("nothing.png")
    (pets / "photos.csv").write_text("\n".join(["path,label,split", *rows]))
    data = load(about(pets / "photos.csv", corrupt="skip"), NO_DATA_DIR)
    assert [(one.name, one.reason) for one in data.listed.excluded] == [
        ("train/cat/gone.png", "no such file"),
        ("train/cat/1.png", "copy of the test image test/cat/same.png"),
    ]
    assert len(data.train.labels) == 6
    with pytest.raises(DataError, match=r"gone\.png: no such file"):
        load(about(pets / "photos.csv"), NO_DATA_DIR)
    rows = [row for row in rows if row != "train/cat/gone.png,cat,train"]
    (pets / "photos.csv").write_text("\n".join(["path,label,split", *rows]))
    with pytest.raises(DataError, match=r"test/cat/link\.png: No such file .*`--corrupt skip` leaves it out"):
        load(about(pets / "photos.csv"), NO_DATA_DIR)


def test_copies_on_both_sides_and_of_two_classes_are_counted(tmp_path: Path) -> None:
    root = make_pets(tmp_path / "pets")
    for target in ("val/cat/1.png", "train/dog/7.png", "train/dog/8.png"):
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / "train" / ("cat/1.png" if "cat" in target else "cat/2.JPG"), root / target)
    add_image(root / "val" / "dog" / "1.png", 99)
    data = prepare(load(about(root), NO_DATA_DIR), about(root), torch.device("cpu"))
    line = "5 images are copies of each other, 3 under two classes and 2 in training and validation"
    assert data.listed.lines(data.validation_ids)[-1].startswith(line)


def test_classes_that_validation_lacks_are_said(tmp_path: Path) -> None:
    for number, place in enumerate(("train/cat", "train/dog", "train/cow", "val/cat", "val/dog")):
        for image in range(2):
            add_image(tmp_path / place / f"{image}.png", 10 * number + image)
    data = prepare(load(about(tmp_path), NO_DATA_DIR), about(tmp_path), torch.device("cpu"))
    line = "no validation image of cow: an F1 of 0 in macro-F1, whatever is predicted"
    assert line in data.listed.lines(data.validation_ids) and line not in data.listed.lines()


def test_unbalanced_classes_are_said(tmp_path: Path) -> None:
    for number in range(20):
        add_image(tmp_path / "dog" / f"{number}.png", number)
    for number in range(2):
        add_image(tmp_path / "cat" / f"{number}.png", 50 + number)
    (line,) = load(about(tmp_path), NO_DATA_DIR).listed.lines()
    assert line == "classes are unbalanced: dog has 20 images, cat has 2; `--set data.sampler=balanced` evens them out"
