"""A data set, split and moved to the device once, as every trial of a study uses it."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.data.datasets import Dataset, Split
from pipeline.data.splits import partition, thinned
from pipeline.recipe import Data, Form


@dataclass(frozen=True)
class TrainingData:
    """Training and validation images on one device; the test split is not here."""

    name: str
    classes: tuple[str, ...]
    source: str
    digest: str
    split_digest: str
    train: Split
    validation: Split
    validation_ids: Tensor  # (num_validation,) positions in the data set's training part, on the CPU
    mean: Tensor  # (3,) of the training images' pixels, in [0, 1]
    std: Tensor  # (3,)
    form: Form | None = None
    read: Callable[[Form], Dataset] | None = None  # all of the data set in another form
    others: dict[Form, "TrainingData"] = field(default_factory=dict)  # the last other form that was asked for

    @property
    def place(self) -> str | None:
        """The file or folder that it was read from, links resolved; None for a data set that comes with a library."""
        return os.path.realpath(self.source) if os.path.isabs(self.source) else None

    @property
    def image_size(self) -> int:
        """Height and width in pixels that the network sees."""
        return self.validation.images.shape[-1]

    def at(self, recipe: Data) -> "TrainingData":
        """The same data in the form of a recipe: read again where it is another one, and kept for the next trial."""
        if self.read is None or recipe.form == self.form:
            return self
        if recipe.form not in self.others:
            self.others.clear()  # one at a time: each may take gigabytes
            self.others[recipe.form] = prepare(self.read(recipe.form), recipe, self.mean.device)
        return self.others[recipe.form]


def prepare(dataset: Dataset, recipe: Data, device: torch.device) -> TrainingData:
    """Split as the recipe says, measure the training images, move everything to the device as uint8."""
    dataset = dataset.at(recipe.form)
    labels = dataset.train.labels
    parts = partition(labels, recipe.validation_fraction, recipe.split_seed)
    parts = thinned(parts, labels, recipe.train_fraction, recipe.split_seed)
    train = (dataset.held or dataset.train).at(parts.train)
    mean, std = pixel_statistics(train.images)
    return TrainingData(
        name=dataset.name,
        classes=dataset.classes,
        source=dataset.source,
        digest=dataset.digest,
        split_digest=parts.digest,
        train=train.at(slice(None), device),
        validation=dataset.train.at(parts.validation, device),
        validation_ids=parts.validation,
        mean=mean.to(device),
        std=std.to(device),
        form=dataset.form,
        read=dataset.read,
    )


def pixel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (3,) float32 in [0, 1] units, of uint8 images (N, 3, S, S).

    Counts the 256 values of each channel, which is exact whatever N. A channel that never varies gets 1, not 0.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in range(3):
        counts = torch.zeros(256, dtype=torch.float64)
        for chunk in images[:, channel].split(4096):
            counts += torch.bincount(chunk.flatten(), minlength=256)
        share = counts / counts.sum()
        mean = (share * values).sum()
        deviation = (share * (values - mean) ** 2).sum().sqrt()
        means.append(mean)
        deviations.append(deviation if deviation > 0 else torch.ones_like(deviation))
    return torch.stack(means).float(), torch.stack(deviations).float()
