"""Which images train, which validate, and which stay sealed as the test split.

The test split is opened by `registry/` only: promotion alone decides by it, see registry/README.md. Images are
drawn by `np.random.RandomState`, whose stream NumPy has frozen (NEP 19), so a seed gives the same split on every machine and
version. Folds of images are scikit-learn's, and a split's digest would tell if another version drew others.
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import Problem, UserError

# Of groups, a share of which is drawn; other numbers where tenths don't give the share, fewer where the groups are.
_FOLDS = 10
_MOST_FOLDS = 40  # but for smaller shares: each takes its time, and these give any to 0.6 points


@dataclass(frozen=True, eq=False)
class Partition:
    """Indices (int64, ascending, disjoint) into a data set's images; the digest changes with either."""

    train: Tensor
    validation: Tensor
    digest: str


def partition(
    labels: Tensor,
    fraction: float,
    seed: int,
    groups: Tensor | None = None,
    names: Sequence[str] = (),
    field: str = "validation_fraction",
) -> Partition:
    """A stratified split of N images by their labels (int64, (N,), 0 to classes - 1); together the sides are all.

    Validation gets exactly round(fraction * N) images, shared over the classes by largest remainder, and each class has
    at least one image on both sides. With `groups` (int64, (N,)) it gets whole groups, which come as near to that as they
    can, with many of like size to within 0.6 points; each class trains. UserError where that can't be; `names` are the
    classes', for that.
    """
    draw = _Draw(labels.numpy(), None if groups is None else groups.numpy(), names, f"data.{field} = {fraction:g}")
    is_validation = draw.share(fraction, seed) if groups is None else draw.groups_of(fraction, seed)
    return of_mask(is_validation)


def fold(
    labels: Tensor, number: int, folds: int, seed: int, groups: Tensor | None = None, names: Sequence[str] = ()
) -> Partition:
    """The fold of this number, from 0, validates and the others train: each image validates in one of the `folds`.

    Stratified, and by `groups` as `partition`. UserError where a class or group is too small for so many.
    """
    draw = _Draw(labels.numpy(), None if groups is None else groups.numpy(), names, f"data.folds = {folds}")
    numbers = draw.fold_numbers(folds, seed)
    for one in range(folds):
        draw.check_trains(numbers != one)
    return of_mask(numbers == number)


def thinned(parts: Partition, labels: Tensor, fraction: float, seed: int, names: Sequence[str] = ()) -> Partition:
    """`parts` with round(fraction * N) of its N training images, drawn as `partition` draws; 1 leaves it as it is.

    `labels` are those of the complete data set. UserError where a class would get none.
    """
    if fraction == 1:
        return parts
    is_used = _Draw(labels[parts.train].numpy(), None, names, f"data.train_fraction = {fraction}").share(fraction, seed)
    return _partition(parts.train.numpy()[is_used], parts.validation.numpy())


def of_mask(is_validation: np.ndarray) -> Partition:
    """The partition of a bool (N,)."""
    return _partition(np.flatnonzero(~is_validation), np.flatnonzero(is_validation))


def _partition(train: np.ndarray, validation: np.ndarray) -> Partition:
    return Partition(torch.from_numpy(train), torch.from_numpy(validation), _digest(train, validation))


def sealed(
    labels: Tensor, fraction: float, seed: int, groups: Tensor | None = None, names: Sequence[str] = ()
) -> tuple[Tensor, Tensor]:
    """(indices that may be used, indices of the test split), for a data set that comes without a test split."""
    split = partition(labels, fraction, seed, groups, names, "test_fraction")
    return split.train, split.validation


@dataclass(frozen=True, eq=False)
class _Draw:
    """What is drawn from: N labels, and groups where there are any; `field` and class `names` are for errors."""

    labels: np.ndarray
    groups: np.ndarray | None
    names: Sequence[str]
    field: str

    def share(self, fraction: float, seed: int) -> np.ndarray:
        """bool (N,): which images are drawn, the same share of each class."""
        shares = self._shares(np.bincount(self.labels), round(fraction * len(self.labels)))
        random = np.random.RandomState(seed)
        is_drawn = np.zeros(len(self.labels), dtype=bool)
        for label, share in enumerate(shares):
            is_drawn[random.permutation(np.flatnonzero(self.labels == label))[:share]] = True
        return is_drawn

    def groups_of(self, fraction: float, seed: int) -> np.ndarray:
        """bool (N,): which images are drawn, whole groups: of some folds the run, of any length, that suits best.

        That leaves most classes something to train on; then, if it can, misses the fraction by no more than half of it,
        and so draws of most classes; then has the numbers of images of the classes nearest to the fraction.
        """
        exact = Fraction(fraction).limit_denominator(_MOST_FOLDS).denominator
        enough = max(exact if _FOLDS % exact else _FOLDS, round(1 / fraction))
        folds = max(2, min(enough, self._num_units, np.bincount(self.labels).max()))
        numbers = self.fold_numbers(folds, seed)
        counts = np.zeros((folds, self.labels.max() + 1), dtype=np.int64)
        np.add.at(counts, (numbers, self.labels), 1)
        images = counts.sum(axis=0)

        def run(start: int, length: int) -> np.ndarray:
            return (np.arange(folds) - start) % folds < length

        def merit(start_length: tuple[int, int]) -> tuple[int, bool, int, float]:
            drawn = counts[run(*start_length)].sum(axis=0)
            too_many = drawn - fraction * images
            is_near = bool(abs(too_many.sum()) <= fraction / 2 * images.sum())
            trained, measured = (int(np.count_nonzero(side)) for side in (images - drawn, drawn))
            return trained, is_near, measured if is_near else 0, -float(np.abs(too_many).sum())

        starts_lengths = [
            (start, length) for length in range(1, folds) for start in range(folds) if counts[run(start, length)].any()
        ]
        is_drawn = run(*max(starts_lengths, key=merit))[numbers]
        self.check_trains(~is_drawn)
        return is_drawn

    def fold_numbers(self, folds: int, seed: int) -> np.ndarray:
        """int64 (N,): in which of the folds each image is; groups whole, classes as even as that allows."""
        units, largest = self._num_units, np.bincount(self.labels).max()
        if folds > min(units, largest):
            unit = "images" if self.groups is None else "groups"
            raise UserError(
                self.field,
                f"takes at least {folds} {unit}, and {folds} images of some class; there are {units}, and {largest}",
                "choose another",
            )
        if self.groups is None:
            return self._folds_of_images(folds, seed)
        return self._folds_of_groups(np.unique(self.groups, return_inverse=True)[1], folds, seed)

    def _folds_of_images(self, folds: int, seed: int) -> np.ndarray:
        from sklearn.model_selection import StratifiedKFold

        numbers = np.empty(len(self.labels), dtype=np.int64)
        with warnings.catch_warnings():
            # Of a class that is in few folds; `check_trains` counts itself.
            warnings.simplefilter("ignore", UserWarning)
            parts = StratifiedKFold(folds, shuffle=True, random_state=seed).split(self.labels, self.labels)
            for number, (_, held_out) in enumerate(parts):
                numbers[held_out] = number
        return numbers

    def _folds_of_groups(self, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
        """The folds of StratifiedGroupKFold of scikit-learn 1.9, exactly; its own loop takes 13 times as long.

        Group by group, those with the least even classes first, goes to the fold with which the classes are spread most
        evenly over the folds; among equal ones to that with the fewest images. `groups`: numbers from 0, without gaps.
        """
        _, labels, images = np.unique(self.labels, return_inverse=True, return_counts=True)
        of_group = np.zeros((groups.max() + 1, len(images)))
        np.add.at(of_group, (groups, labels), 1)
        shuffled = np.arange(len(of_group))
        np.random.RandomState(seed).shuffle(shuffled)
        of_fold, numbers = np.zeros((folds, len(images))), np.empty(len(of_group), dtype=np.int64)
        one_more = np.eye(folds)[:, :, None]  # (folds, folds, 1): the group is in this fold, of all
        for group in shuffled[np.argsort(-np.std(of_group[shuffled], axis=1), kind="stable")]:
            spread = np.std((of_fold + one_more * of_group[group]) / images, axis=1).mean(axis=1).tolist()
            sizes = of_fold.sum(axis=1).tolist()
            best = 0
            for one in range(1, folds):
                is_as_even = abs(spread[one] - spread[best]) <= 1e-8 + 1e-5 * abs(spread[best])  # as np.isclose
                if spread[one] < spread[best] or (is_as_even and sizes[one] < sizes[best]):
                    best = one
            numbers[group] = best
            of_fold[best] += of_group[group]
        return numbers[groups]

    @property
    def _num_units(self) -> int:
        """Of what is drawn: groups, or else images."""
        return len(self.labels if self.groups is None else np.unique(self.groups))

    def check_trains(self, is_trained: np.ndarray) -> None:
        """UserError with the classes that have no image to train on."""
        missing = sorted(set(np.unique(self.labels)) - set(np.unique(self.labels[is_trained])))
        unit = "image" if self.groups is None else "group"
        if missing:
            rule = f"leaves no {unit} to train on"
            raise UserError.many(
                [Problem(f"{self.field}, {self._class(label)}", rule, f"add {unit}s of it") for label in missing]
            )

    def _class(self, label: int) -> str:
        return f"class {self.names[label] if len(self.names) else label}"

    def _shares(self, counts: np.ndarray, total: int) -> np.ndarray:
        """How many of each class's images are drawn: `total` in all, from 1 to count - 1 each."""
        images, classes = counts.sum(), len(counts)
        problems = [
            Problem(
                f"{self.field}, {self._class(label)}",
                f"has {count} {'image' if count == 1 else 'images'} for it, and needs one on each side",
                "add images of it",
            )
            for label, count in enumerate(counts)
            if count < 2
        ]
        if problems:
            raise UserError.many(problems)
        if (few := total < classes) or total > images - classes:
            raise UserError(
                self.field,
                f"gives {total} of {images} images, but {classes} classes with at least one image on each side need "
                f"{classes} to {images - classes}"
                + (f", from {np.ceil(100 * classes / images) / 100:g} on" if few else ""),
            )
        shares = np.ones_like(counts)
        for _ in range(total - classes):  # full quotas first, then the largest remainders; in integers: no rounding
            remainders = np.where(shares < counts - 1, counts * total - shares * images, np.iinfo(np.int64).min)
            shares[np.argmax(remainders)] += 1
        return shares


def _digest(train: np.ndarray, validation: np.ndarray) -> str:
    sizes = np.array([len(train), len(validation)])
    return hashlib.sha256(np.concatenate([sizes, train, validation]).astype("<i8").tobytes()).hexdigest()
