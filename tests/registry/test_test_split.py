"""The test split holds what no trial has seen, and its digest is known before it is opened."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.datasets import listed, load
from pipeline.errors import DataError
from pipeline.registry import test_split as opener
from pipeline.sections.data import Data, Form

DIGITS = [str(digit) for digit in range(10)]


def about(dataset: object, test_fraction: float = 0) -> Data:
    return Data(dataset=str(dataset), image_size=8, test_fraction=test_fraction)


def folder(root: Path) -> Path:
    """Two classes, four training and three test images each; an image's grey says which it is."""
    for part, count in (("train", 4), ("test", 3)):
        for number, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for image in range(count):
                grey = 100 * number + 10 * image + (5 if part == "test" else 0)
                Image.new("RGB", (8, 8), (grey, grey, grey)).save(root / part / name / f"{image}.png")
    return root


def test_test_digits_are_those_that_no_trial_sees() -> None:
    from sklearn.datasets import load_digits

    split, usable = (
        opener.open_test_split(about("digits"), Form(8), Path("data"), DIGITS),
        load(Data(dataset="digits", image_size=8), Path("data")).train,
    )
    assert split.images.shape == (359, 3, 8, 8) and len(usable.labels) + len(split.labels) == 1797
    both = np.concatenate([usable.images.numpy()[:, 0], split.images.numpy()[:, 0]]).reshape(1797, -1)
    all_digits = np.rint(load_digits().images * (255 / 16)).astype(np.uint8).reshape(1797, -1)
    assert sorted(map(bytes, both)) == sorted(map(bytes, all_digits))
    assert np.bincount(split.labels.numpy()).min() >= 34


def test_cifar10_test_images_are_its_10_000_others(cifar10_dir: Path) -> None:
    classes = load(Data(dataset="cifar10", image_size=32), cifar10_dir).classes
    split = opener.open_test_split(about("cifar10"), Form(32), cifar10_dir, classes)
    assert split.images.shape == (10_000, 3, 32, 32) and np.bincount(split.labels.numpy()).tolist() == [1000] * 10
    turned = opener.open_test_split(about("cifar10"), Form(8), cifar10_dir, classes[::-1])
    assert turned.labels.tolist() == [9 - label for label in split.labels.tolist()], "indices into the model's classes"
    assert len(opener.digest_of(about("cifar10"), cifar10_dir)) == 64


def test_missing_cifar10_is_refused(tmp_path: Path) -> None:
    for call in (
        lambda: opener.digest_of(about("cifar10"), tmp_path),
        lambda: opener.open_test_split(about("cifar10"), Form(32), tmp_path, ["a"]),
    ):
        with pytest.raises(DataError, match="test_batch: missing"):
            call()


def test_folder_labels_are_in_the_order_of_the_model(tmp_path: Path) -> None:
    root = folder(tmp_path)
    split = opener.open_test_split(about(root), Form(8), tmp_path, ["dog", "cat"])
    assert [int(image[0, 0, 0]) for image in split.images] == [5, 15, 25, 105, 115, 125]
    assert split.labels.tolist() == [1, 1, 1, 0, 0, 0]


def test_digest_changes_with_any_byte_and_nothing_else(tmp_path: Path) -> None:
    root = folder(tmp_path)
    name = opener.digest_of(about(root), tmp_path)
    Image.new("RGB", (8, 8)).save(root / "train" / "cat" / "new.png")
    assert opener.digest_of(about(f"{root}/"), Path("elsewhere")) == name
    Image.new("RGB", (8, 8)).save(root / "test" / "cat" / "0.png")
    assert opener.digest_of(about(root), tmp_path) != name
    digits = opener.digest_of(about("digits"), tmp_path)
    assert digits == opener.digest_of(about("digits"), tmp_path) and digits != name


def test_split_with_missing_files_has_a_name_where_those_are_skipped(tmp_path: Path) -> None:
    root = folder(tmp_path)
    skipping = about(root).model_copy(update={"corrupt": "skip"})
    whole = opener.digest_of(about(root), tmp_path)
    assert opener.digest_of(skipping, tmp_path) == whole
    (root / "test" / "cat" / "0.png").unlink()
    (root / "test" / "cat" / "0.png").symlink_to("nothing.png")
    name = opener.digest_of(skipping, tmp_path)
    assert opener.digest_of(skipping, tmp_path) == name != whole
    assert len(opener.open_test_split(skipping, Form(8), tmp_path, ["cat", "dog"]).labels) == 5
    with pytest.raises(DataError, match=r"cat/0\.png: No such file"):
        opener.digest_of(about(root), tmp_path)


def test_folder_without_test_images_names_the_way_out(tmp_path: Path) -> None:
    root = folder(tmp_path)
    (root / "test").rename(root / "other")
    with pytest.raises(DataError, match=r"has no test split: .* run the study again without `--test-fraction 0`"):
        opener.digest_of(about(root), tmp_path)
    (root / "test" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="has no test split"):
        opener.digest_of(about(root), tmp_path)


def test_drawn_test_split_is_what_no_trial_sees(tmp_path: Path) -> None:
    root, about_it = folder(tmp_path) / "train", about(tmp_path / "train", test_fraction=0.25)
    split = opener.open_test_split(about_it, Form(8), tmp_path, ["cat", "dog"], tmp_path)
    usable = load(about_it, tmp_path, tmp_path).train.images[:]
    greys = [int(image[0, 0, 0]) for image in (*split.images, *usable)]
    assert sorted(greys) == [0, 10, 20, 30, 100, 110, 120, 130] and split.labels.tolist() == [0, 1]
    name = opener.digest_of(about_it, tmp_path, tmp_path)
    listed(about_it, tmp_path).fix(tmp_path)
    Image.new("RGB", (8, 8)).save(root / "cat" / "new.png")
    assert name == opener.digest_of(about(root, test_fraction=0.25), tmp_path, tmp_path)


def test_digest_of_a_manifests_test_split_changes_with_a_label(tmp_path: Path) -> None:
    folder(tmp_path)
    rows = [
        f"{part}/{name}/{number}.png,{name},{part}"
        for part, count in (("train", 4), ("test", 3))
        for name in ("cat", "dog")
        for number in range(count)
    ]
    names = []
    for label in ("dog", "cat"):
        (tmp_path / "pets.csv").write_text("\n".join(["path,label,split", *rows[:-1], f"test/dog/2.png,{label},test"]))
        names.append(opener.digest_of(about(tmp_path / "pets.csv"), tmp_path))
    split = opener.open_test_split(about(tmp_path / "pets.csv"), Form(8), tmp_path, ["dog", "cat"])
    assert names[0] != names[1] and split.labels.tolist() == [1, 1, 1, 1, 0, 0]


def test_images_of_files_are_read_a_batch_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, without those that can't be read; so a test split need not fit in memory."""
    monkeypatch.setattr(opener, "BATCHES", 1)
    monkeypatch.setattr(opener, "images_together", lambda size: 2)
    root = folder(tmp_path)
    arguments = (Form(8), tmp_path, ["cat", "dog"])
    whole = opener.open_test_split(about(root), *arguments)
    (root / "test" / "cat" / "0.png").write_bytes(b"")
    parts = list(opener.read_test_split(about(root).model_copy(update={"corrupt": "skip"}), *arguments))
    assert {len(part.labels) for part in parts} == {1, 2} and len(parts) == len(whole.labels) // 2
    assert torch.equal(torch.cat([part.images[:] for part in parts]), whole.images[1:])
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels[1:])
    with pytest.raises(DataError, match=r"cat/0\.png.*empty.*\n.*replace or remove them; the run stays promotable"):
        list(opener.read_test_split(about(root), *arguments))
    before = load(about(root), tmp_path).digest
    (root / "test" / "cat" / "0.png").unlink()
    assert opener.open_test_split(about(root), *arguments).images.shape[0] == 5
    assert load(about(root), tmp_path).digest == before, "what the run was trained on"


def test_class_unknown_to_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="classes that the model doesn't know: dog"):
        opener.open_test_split(about(folder(tmp_path)), Form(8), tmp_path, ["cat", "cow"])
