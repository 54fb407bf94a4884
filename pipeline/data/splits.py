"""Which images train, which judge, and which stay sealed.

The test split is opened by `registry/` only, to judge a candidate for promotion; nothing here or in `datasets.py` reads
it. All draws come from `np.random.RandomState`: NumPy has frozen its stream for ever (NEP 19), so a seed gives the same
split on every machine and version.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UserError


@dataclass(frozen=True, eq=False)
class Partition:
    """Indices (int64, ascending, disjoint, together all) into a data set's images; the digest changes with either."""

    train: Tensor
    validation: Tensor
    digest: str


def partition(labels: Tensor, fraction: float, seed: int) -> Partition:
    """A stratified split of N images by their labels (int64, (N,), 0 to classes - 1).

    Validation gets exactly round(fraction * N) images, shared over the classes by largest remainder, and each class has
    at least one image on both sides; UserError where that can't be.
    """
    classes = labels.numpy()
    shares = _shares(np.bincount(classes), round(fraction * len(classes)), fraction)
    random = np.random.RandomState(seed)
    is_validation = np.zeros(len(classes), dtype=bool)
    for label, share in enumerate(shares):
        is_validation[random.permutation(np.flatnonzero(classes == label))[:share]] = True
    train, validation = np.flatnonzero(~is_validation), np.flatnonzero(is_validation)
    return Partition(torch.from_numpy(train), torch.from_numpy(validation), _digest(train, validation))


def sealed(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """(indices that may be used, indices of the test split), for a data set that comes without a test split."""
    split = partition(labels, fraction, seed)
    return split.train, split.validation


def _shares(counts: np.ndarray, total: int, fraction: float) -> np.ndarray:
    """How many of each class's images validate: `total` in all, from 1 to count - 1 each."""
    images, classes = counts.sum(), len(counts)
    lines = [
        f"class {label} has {count} {'image' if count == 1 else 'images'}: a split needs at least 2"
        for label, count in enumerate(counts)
        if count < 2
    ]
    if lines:
        raise UserError(lines)
    if not classes <= total <= images - classes:
        raise UserError(
            f"data.validation_fraction = {fraction}: gives {total} of {images} images, but {classes} classes with at "
            f"least one image on each side need {classes} to {images - classes}"
        )
    shares = np.ones_like(counts)
    for _ in range(total - classes):  # whole shares first, then the largest remainders; in integers: no rounding
        owed = np.where(shares < counts - 1, counts * total - shares * images, np.iinfo(np.int64).min)
        shares[np.argmax(owed)] += 1
    return shares


def _digest(train: np.ndarray, validation: np.ndarray) -> str:
    sizes = np.array([len(train), len(validation)])
    return hashlib.sha256(np.concatenate([sizes, train, validation]).astype("<i8").tobytes()).hexdigest()
