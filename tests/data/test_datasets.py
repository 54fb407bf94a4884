"""What a data set is called, and how its digest changes."""

from pathlib import Path

import pytest
from data_cases import NO_DATA_DIR, about, add_image, lines_of, make_pets

from pipeline.data.datasets import default_image_size, load
from pipeline.errors import DataError, UserError


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return make_pets(tmp_path / "My Pets!")


def test_each_data_set_has_a_natural_size_and_a_folder_none() -> None:
    assert [default_image_size(name) for name in ("cifar10", "digits", "./pets")] == [32, 16, None]


def test_unknown_name_lists_known_data_sets_and_the_closest() -> None:
    known = "cifar10, digits, or the path of a folder of images by class, or of a manifest (.csv, .parquet)"
    assert lines_of(UserError, "cifar100") == [f"data.dataset = cifar100: not one of {known} (did you mean cifar10?)"]
    assert lines_of(UserError, "digitz") == [f"data.dataset = digitz: not one of {known} (did you mean digits?)"]
    assert lines_of(UserError, "imagenet") == [f"data.dataset = imagenet: not one of {known}"]
    assert lines_of(DataError, "./pets") == [f"data.dataset = ./pets: there is nothing; give one of {known}"]
    assert lines_of(DataError, "pets.csv") == [f"data.dataset = pets.csv: there is nothing; give one of {known}"]
    assert lines_of(DataError, __file__) == [
        f"data.dataset = {__file__}: neither a folder nor a manifest; give one of {known}"
    ]


@pytest.mark.parametrize(
    ("folder", "name"),
    [("CIFAR-100_v2", "cifar-100_v2"), ("Kühe & Co.", "k-he-co"), ("数据", "folder"), ("a" * 99, "a" * 40)],
)
def test_folder_name_is_made_safe(pets: Path, folder: str, name: str) -> None:
    data = load(about(str(pets.rename(pets.with_name(folder))), 8), NO_DATA_DIR)
    assert data.name == f"{name}-{data.digest[:6]}"


def test_current_folder_has_a_name(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pets)
    assert load(about(".", 8), NO_DATA_DIR).name.startswith("my-pets-")


def test_tilde_is_the_home_folder(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(pets.parent))
    assert load(about("~/My Pets!", 8), NO_DATA_DIR).source == str(pets)


def test_digest_changes_with_pixel_label_and_class_name(pets: Path) -> None:
    def digest() -> str:
        return load(about(str(pets), 12), NO_DATA_DIR).digest

    train = pets / "train"
    seen = [digest()]
    assert load(about(str(pets), 13, geometry="crop"), NO_DATA_DIR).digest == digest(), (
        "the size is no part of the data"
    )
    add_image(train / "cat" / "1.png", 1)
    seen.append(digest())
    (train / "dog").rename(train / "wolf")
    seen.append(digest())
    (train / "wolf" / "1.bmp").rename(train / "cat" / "3.bmp")  # the same pixels in the same order
    seen.append(digest())
    assert len(set(seen)) == 4
    (train / "cat" / "3.bmp").rename(train / "cat" / "4.bmp")  # a file's name is no part of the data
    assert digest() == seen[-1]
