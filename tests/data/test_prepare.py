"""Data, split and measured once for all trials of a study."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from data_cases import add_image, make_pets

from pipeline.data import prepare as prepare_module
from pipeline.data.datasets import load
from pipeline.data.mapped import MappedImages
from pipeline.data.prepare import MEMORY_SHARE, TrainingData, pixel_statistics, prepare
from pipeline.errors import DataError
from pipeline.sections.data import Data


def test_pixel_statistics_equal_those_of_the_floats() -> None:
    images = torch.randint(0, 256, (5000, 3, 4, 4), dtype=torch.uint8)
    mean, std = pixel_statistics(images)
    floats = images.double() / 255
    torch.testing.assert_close(mean.double(), floats.mean((0, 2, 3)), atol=1e-7, rtol=0)
    torch.testing.assert_close(std.double(), floats.std((0, 2, 3), correction=0), atol=1e-7, rtol=0)


def test_a_channel_that_never_varies_is_not_divided_by_zero() -> None:
    mean, std = pixel_statistics(torch.full((10, 3, 2, 2), 51, dtype=torch.uint8))
    torch.testing.assert_close(mean, torch.full((3,), 0.2))
    torch.testing.assert_close(std, torch.ones(3))


def test_training_and_validation_are_disjoint_parts_of_the_data_set(digits: TrainingData, tmp_path) -> None:
    dataset = load(Data(dataset="digits", image_size=8), tmp_path)
    assert len(digits.train.labels) + len(digits.validation.labels) == len(dataset.train.labels)
    assert torch.equal(dataset.train.images[digits.validation_ids], digits.validation.images)
    assert torch.equal(dataset.train.labels[digits.validation_ids], digits.validation.labels)


def test_the_statistics_are_of_the_training_images_alone(digits: TrainingData) -> None:
    mean, std = pixel_statistics(digits.train.images)
    assert torch.equal(mean, digits.mean)
    assert torch.equal(std, digits.std)


def test_the_split_seed_changes_the_split_and_its_digest(digits: TrainingData, tmp_path) -> None:
    dataset = load(Data(dataset="digits", image_size=8), tmp_path)
    other = prepare(dataset, Data(dataset="digits", image_size=8, split_seed=1), torch.device("cpu"))
    again = prepare(dataset, Data(dataset="digits", image_size=8), torch.device("cpu"))
    assert other.split_digest != digits.split_digest == again.split_digest
    assert not torch.equal(other.validation_ids, digits.validation_ids)


def test_train_fraction_keeps_the_validation_images(digits: TrainingData, tmp_path) -> None:
    dataset = load(Data(dataset="digits", image_size=8), tmp_path)
    third = prepare(dataset, Data(dataset="digits", image_size=8, train_fraction=1 / 3), torch.device("cpu"))
    assert len(third.train.labels) == round(len(digits.train.labels) / 3)
    assert torch.equal(third.validation.images, digits.validation.images)
    assert torch.equal(third.mean, pixel_statistics(third.train.images)[0])


CPU = torch.device("cpu")


def test_other_form_is_the_same_data_and_split(tmp_path: Path) -> None:
    root = make_pets(tmp_path / "pets")
    base = Data(dataset=str(root), image_size=8, validation_fraction=0.4, test_fraction=0)
    data = prepare(load(base, tmp_path), base, CPU)
    cut = base.model_copy(update={"image_size": 10, "geometry": "random_resized_crop", "crop_scale": 0.25})
    other = data.at(cut)
    assert data.at(base) is data and data.at(cut) is other, "it is read once"
    assert (other.digest, other.split_digest) == (data.digest, data.split_digest)
    assert torch.equal(other.validation.labels, data.validation.labels)
    assert other.train.images.shape[1:] == (3, 20, 20), "the smallest part has the size of a batch"
    assert other.image_size == 10 and other.validation.images.shape[1:] == (3, 10, 10)
    torch.testing.assert_close(other.train.aspects, torch.full((len(data.train.labels),), 10 / 14))
    assert data.train.aspects is None


@pytest.mark.parametrize("geometry", ["crop", "random_resized_crop"])
def test_images_that_are_too_many_for_memory_stay_in_their_file(
    geometry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Data(dataset=str(make_pets(tmp_path / "pets")), image_size=8, validation_fraction=0.4, test_fraction=0)
    base = base.model_copy(update={"geometry": geometry, "crop_scale": 0.3})
    uncached = prepare(load(base, tmp_path), base, CPU)
    cached = load(base, tmp_path, tmp_path / "mlruns")
    fits = prepare(cached, base, CPU)
    monkeypatch.setitem(MEMORY_SHARE, "cpu", 0)
    streamed = prepare(cached, base, CPU)
    assert isinstance(fits.train.images, torch.Tensor) and isinstance(streamed.train.images, MappedImages)
    for data in (fits, streamed):
        for split, expected in ((data.train, uncached.train), (data.validation, uncached.validation)):
            assert torch.equal(split.images[:], expected.images) and torch.equal(split.labels, expected.labels)
        assert torch.equal(data.mean, uncached.mean) and torch.equal(data.std, uncached.std)
        assert (data.digest, data.image_size) == (uncached.digest, 8)


def test_worker_that_shares_a_gpu_may_hold_a_share_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")  # as the command line has it
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=800))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_getMemoryFraction", lambda index: {0: 0.25}[index], raising=False)
    assert prepare_module._most_in_memory(device) == 25


def test_groups_and_folds_of_a_manifest_decide_the_split(tmp_path: Path) -> None:
    for number in range(12):
        add_image(tmp_path / f"{number:02}.png", 20 * number)
    rows = [f"{number:02}.png,{'cat' if number % 2 else 'dog'},g{number // 4}" for number in range(12)]
    (tmp_path / "pets.csv").write_text("\n".join(["path,label,group", *rows]))
    about = Data(dataset=str(tmp_path / "pets.csv"), image_size=8, test_fraction=0, validation_fraction=0.3)
    data = prepare(load(about, tmp_path), about, CPU)
    assert data.validation.labels.tolist() == [0, 0, 1, 1], "one group of three"
    folds = [data.at(about.model_copy(update={"folds": 3, "fold": fold})) for fold in range(3)]
    assert sorted(torch.cat([fold.validation_ids for fold in folds]).tolist()) == list(range(12))
    assert folds[2] is data.at(about.model_copy(update={"folds": 3, "fold": 2})) and folds[2].digest == data.digest
    assert (data.drawn_fraction, folds[0].drawn_fraction) == (0.3, None)


def test_folder_that_changes_between_two_forms_is_refused(tmp_path: Path) -> None:
    root = make_pets(tmp_path / "pets")
    base = Data(dataset=str(root), image_size=8, validation_fraction=0.4, test_fraction=0)
    data = prepare(load(base, tmp_path), base, CPU)
    add_image(root / "train" / "cat" / "new.png", 99)
    larger = data.at(base.model_copy(update={"image_size": 12}))
    assert larger.digest == data.digest, "what is added waits for the next command"
    assert load(base, tmp_path).digest != data.digest
    add_image(root / "train" / "cat" / "1.png", 99)
    with pytest.raises(DataError, match="changed while they were in use"):
        data.at(base.model_copy(update={"geometry": "pad"}))
