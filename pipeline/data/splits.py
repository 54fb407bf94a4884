"""Which images train, which validate, and which stay sealed as the test split.

The test split is opened by `registry/` only, to evaluate a candidate for promotion; nothing in `data/` reads it. All draws
come from `np.random.RandomState`, whose stream NumPy has frozen (NEP 19), so a seed gives the same split on every machine
and version.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import Problem, UserError


@dataclass(frozen=True, eq=False)
class Partition:
    """Indices (int64, ascending, disjoint) into a data set's images; the digest changes with either."""

    train: Tensor
    validation: Tensor
    digest: str


def partition(labels: Tensor, fraction: float, seed: int) -> Partition:
    """A stratified split of N images by their labels (int64, (N,), 0 to classes - 1); together the sides are all.

    Validation gets exactly round(fraction * N) images, shared over the classes by largest remainder, and each class has
    at least one image on both sides; UserError where that can't be.
    """
    is_validation = _draw(labels.numpy(), fraction, seed, "validation_fraction")
    return _partition(np.flatnonzero(~is_validation), np.flatnonzero(is_validation))


def thinned(parts: Partition, labels: Tensor, fraction: float, seed: int) -> Partition:
    """`parts` with round(fraction * N) of its N training images, drawn as `partition` draws; 1 leaves it as it is.

    `labels` are those of the complete data set. UserError where a class would get none.
    """
    if fraction == 1:
        return parts
    is_used = _draw(labels[parts.train].numpy(), fraction, seed, "train_fraction")
    return _partition(parts.train.numpy()[is_used], parts.validation.numpy())


def _partition(train: np.ndarray, validation: np.ndarray) -> Partition:
    return Partition(torch.from_numpy(train), torch.from_numpy(validation), _digest(train, validation))


def _draw(classes: np.ndarray, fraction: float, seed: int, field: str) -> np.ndarray:
    """bool (N,): which images are drawn, the same share of each class."""
    shares = _shares(np.bincount(classes), round(fraction * len(classes)), f"data.{field} = {fraction}")
    random = np.random.RandomState(seed)
    is_drawn = np.zeros(len(classes), dtype=bool)
    for label, share in enumerate(shares):
        is_drawn[random.permutation(np.flatnonzero(classes == label))[:share]] = True
    return is_drawn


def sealed(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """(indices that may be used, indices of the test split), for a data set that comes without a test split."""
    split = partition(labels, fraction, seed)
    return split.train, split.validation


def _shares(counts: np.ndarray, total: int, field: str) -> np.ndarray:
    """How many of each class's images are drawn: `total` in all, from 1 to count - 1 each; `field` is for the error."""
    images, classes = counts.sum(), len(counts)
    problems = [
        Problem(f"class {label} has {count} {'image' if count == 1 else 'images'}", "a split needs at least 2")
        for label, count in enumerate(counts)
        if count < 2
    ]
    if problems:
        raise UserError.many(problems)
    if not classes <= total <= images - classes:
        raise UserError(
            field,
            f"gives {total} of {images} images, but {classes} classes with at least one image on each side need "
            f"{classes} to {images - classes}",
        )
    shares = np.ones_like(counts)
    for _ in range(total - classes):  # full quotas first, then the largest remainders; in integers: no rounding
        remainders = np.where(shares < counts - 1, counts * total - shares * images, np.iinfo(np.int64).min)
        shares[np.argmax(remainders)] += 1
    return shares


def _digest(train: np.ndarray, validation: np.ndarray) -> str:
    sizes = np.array([len(train), len(validation)])
    return hashlib.sha256(np.concatenate([sizes, train, validation]).astype("<i8").tobytes()).hexdigest()
