"""Data, split and measured once for all trials of a study."""

import torch

from pipeline.data.datasets import load
from pipeline.data.prepare import TrainingData, pixel_statistics, prepare
from pipeline.recipe import Data, Form


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
    dataset = load("digits", Form(8), tmp_path)
    assert len(digits.train.labels) + len(digits.validation.labels) == len(dataset.train.labels)
    assert torch.equal(dataset.train.images[digits.validation_ids], digits.validation.images)
    assert torch.equal(dataset.train.labels[digits.validation_ids], digits.validation.labels)


def test_the_statistics_are_of_the_training_images_alone(digits: TrainingData) -> None:
    mean, std = pixel_statistics(digits.train.images)
    assert torch.equal(mean, digits.mean)
    assert torch.equal(std, digits.std)


def test_the_split_seed_changes_the_split_and_its_digest(digits: TrainingData, tmp_path) -> None:
    dataset = load("digits", Form(8), tmp_path)
    other = prepare(dataset, Data(dataset="digits", image_size=8, split_seed=1), torch.device("cpu"))
    again = prepare(dataset, Data(dataset="digits", image_size=8), torch.device("cpu"))
    assert other.split_digest != digits.split_digest == again.split_digest
    assert not torch.equal(other.validation_ids, digits.validation_ids)


def test_train_fraction_keeps_the_validation_images(digits: TrainingData, tmp_path) -> None:
    dataset = load("digits", Form(8), tmp_path)
    third = prepare(dataset, Data(dataset="digits", image_size=8, train_fraction=1 / 3), torch.device("cpu"))
    assert len(third.train.labels) == round(len(digits.train.labels) / 3)
    assert torch.equal(third.validation.images, digits.validation.images)
    assert torch.equal(third.mean, pixel_statistics(third.train.images)[0])
