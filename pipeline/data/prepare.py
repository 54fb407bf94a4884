"""A data set, split and moved to the device once, as every trial of a study uses it."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
import torch
from torch import Tensor

from pipeline.data.datasets import Dataset, Listed, Split
from pipeline.data.images import resized
from pipeline.data.mapped import MappedImages, sums_of
from pipeline.data.splits import Partition, fold, of_mask, partition, thinned
from pipeline.sections.data import Data, Form

# Of a device's memory: what a data set of files may take, which trainings need twice, padded. Workers share a device.
MEMORY_SHARE = {"cuda": 1 / 8, "cpu": 1 / 16}

View = tuple[Form, int, int]  # form of the images, number of folds, and which of them validates


@dataclass(frozen=True)
class TrainingData:
    """Training and validation images, labels on one device; the test split is not here."""

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
    drawn_fraction: float | None = None  # the recipe's, where that drew the validation split: neither given nor a fold
    listed: Listed | None = None  # what says which images there are, where they lie in files
    view: View | None = None
    read: Callable[[Form], Dataset] | None = None  # all of the data set in another form
    others: dict[View, "TrainingData"] = field(default_factory=dict)  # the last other view that was asked for

    @property
    def place(self) -> str | None:
        """The file or folder that it was read from, links resolved; None for a data set that comes with a library."""
        return os.path.realpath(self.source) if os.path.isabs(self.source) else None

    @property
    def image_size(self) -> int:
        """Height and width in pixels that the network sees."""
        return self.validation.images.shape[-1]

    def sample(self, count: int) -> Tensor:
        """At most so many training images, uint8 (N, 3, S, S) on the CPU; squashed where held larger, for random crops."""
        step = -(-len(self.train.labels) // count)  # spread out: a folder's images lie class by class
        return resized(self.train.images[::step].cpu(), Form(self.image_size))

    def at(self, recipe: Data) -> "TrainingData":
        """The same data in the form and fold of a recipe: read again where it is another one, and kept for the next trial."""
        view = recipe.form, recipe.folds, recipe.fold
        if self.read is None or view == self.view:
            return self
        if view not in self.others:
            self.others.clear()  # one at a time: each may take gigabytes
            self.others[view] = prepare(self.read(recipe.form), recipe, self.mean.device)
        return self.others[view]


def prepare(dataset: Dataset, recipe: Data, device: torch.device) -> TrainingData:
    """Split as the recipe says, measure the training images, move everything to the device as uint8.

    Images in files that would take too much of its memory stay there: they are read batch by batch, to the same numbers.
    """
    dataset = dataset.at(recipe.form)
    parts = partition_of(dataset, recipe)
    train, validation = (dataset.held or dataset.train).at(parts.train), dataset.train.at(parts.validation)
    mean, std = pixel_statistics(train.images)
    fits = train.images.nbytes + validation.images.nbytes <= _most_in_memory(device)
    return TrainingData(
        name=dataset.name,
        classes=dataset.classes,
        source=dataset.source,
        digest=dataset.digest,
        split_digest=parts.digest,
        train=train.on(device, in_memory=fits),
        validation=validation.on(device, in_memory=fits),
        validation_ids=parts.validation,
        mean=mean.to(device),
        std=std.to(device),
        drawn_fraction=None if recipe.folds or dataset.is_validation is not None else recipe.validation_fraction,
        listed=dataset.listed,
        view=(recipe.form, recipe.folds, recipe.fold),
        read=dataset.read,
    )


def partition_of(dataset: Dataset, recipe: Data) -> Partition:
    """Which images train and which validate: by the recipe's folds if it has any, else as given, else drawn."""
    labels, groups, classes = dataset.train.labels, dataset.groups, dataset.classes
    if recipe.folds:
        parts = fold(labels, recipe.fold, recipe.folds, recipe.split_seed, groups, classes)
    elif dataset.is_validation is not None:
        parts = of_mask(dataset.is_validation.numpy())
    else:
        parts = partition(labels, recipe.validation_fraction, recipe.split_seed, groups, classes)
    return thinned(parts, labels, recipe.train_fraction, recipe.split_seed, classes)


def _most_in_memory(device: torch.device) -> float:
    """Bytes; of a GPU a share of what this process may take, which others may share with it."""
    if device.type == "cuda":
        fraction = torch.cuda.get_per_process_memory_fraction(device.index)
        return MEMORY_SHARE["cuda"] * fraction * torch.cuda.get_device_properties(device).total_memory
    return MEMORY_SHARE["cpu"] * psutil.virtual_memory().total


def pixel_statistics(images: Tensor | MappedImages) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (3,) float32 in [0, 1] units, of uint8 images (N, 3, S, S).

    From whole numbers, so exact whatever N. A channel that never varies gets 1, not 0.
    """
    if isinstance(images, MappedImages):
        sums = images.sums.sum(0)
    else:
        sums = sum(sums_of(chunk.numpy()).sum(0) for chunk in images.cpu().split(4096))
    count, (first, second) = images.shape[0] * images.shape[2] * images.shape[3], sums.tolist()
    means = [one / (255 * count) for one in first]
    variances = [(count * two - one**2) / (255 * count) ** 2 for one, two in zip(first, second, strict=True)]
    return torch.tensor(means), torch.tensor([math.sqrt(variance) or 1.0 for variance in variances])
