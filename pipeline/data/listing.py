"""What a data set of files consists of: a row for each image, whether a folder or a manifest says so.

Reading, splitting and digests follow from the rows alone. Rows of the split `test` stay sealed: `registry/` opens them.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Self

import numpy as np

from pipeline.data.images import SUFFIXES, left_out_line
from pipeline.errors import DataError, Problem, did_you_mean, first_names

TRAIN, VALIDATION, TEST = "train", "val", "test"
ORDER = (TRAIN, VALIDATION, TEST)  # of the rows
# What a split may be called, in any case, by a folder or in a manifest.
SPLITS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), VALIDATION),
    **dict.fromkeys(("test", "testing"), TEST),
}
MANIFESTS = (".csv", ".parquet")  # how their names end, in any case
MAX_LISTED = 20  # problems that an error lists


def root_of(place: str) -> str:
    """The folder that all images of a folder or manifest lie in; it may be gone."""
    return os.path.dirname(place) if place.lower().endswith(MANIFESTS) and not os.path.isdir(place) else place


@dataclass(frozen=True, eq=False)
class Listing:
    """N images, ordered by split, class and path."""

    place: Path  # the folder or the manifest, absolute
    classes: tuple[str, ...]  # sorted; those that there are training images of
    names: list[str]  # the path of each image below the root
    labels: np.ndarray  # int64 (N,), indices into `classes`
    splits: np.ndarray  # str (N,), TRAIN, VALIDATION or TEST
    groups: np.ndarray | None = None  # str (N,): images of one never lie on two sides of a split
    left_out: Counter[str] = field(default_factory=Counter)  # kind of file -> how many aren't images, by `image_files`
    unused: tuple[str, ...] = ()  # columns of the manifest that say nothing here

    @property
    def root(self) -> Path:
        """The folder that all images lie in."""
        return Path(root_of(str(self.place)))

    @cached_property
    def is_manifest(self) -> bool:
        """Whether a file says which images there are; in a folder, an image's path says its class, too."""
        return self.place.is_file()

    @property
    def short_name(self) -> str:
        """The folder's or manifest's name, made of a-z, 0-9, _ and - only, at most 40 characters."""
        name = self.place.stem if self.is_manifest else self.place.name
        return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-")[:40] or "folder"

    @property
    def files(self) -> list[str]:
        """The path of each image; texts, as hundreds of thousands of `Path` take seconds."""
        prefix = os.path.join(self.root, "")
        return [prefix + name for name in self.names]

    @property
    def usable(self) -> Self:
        """What may train or validate."""
        return self.where(self.splits != TEST)

    @property
    def sealed_part(self) -> Self:
        """The test split; for `registry/test_split.py` alone."""
        return self.where(self.splits == TEST)

    def has(self, split: str) -> bool:
        """Whether there are images of a split."""
        return bool((self.splits == split).any())

    @property
    def test_digest(self) -> str | None:
        """SHA-256 of which images are sealed, by their names; None where none are."""
        names = [name for name, split in zip(self.names, self.splits, strict=True) if split == TEST]
        return hashlib.sha256(json.dumps(sorted(names)).encode()).hexdigest() if names else None

    @property
    def group_numbers(self) -> np.ndarray | None:
        """int64 (N,): the same number for the images of a group."""
        return None if self.groups is None else np.unique(self.groups, return_inverse=True)[1].astype(np.int64)

    def with_splits(self, splits: np.ndarray) -> Self:
        """The same images in other splits, in order again."""
        rank = sum(number * (splits == split) for number, split in enumerate(ORDER))
        return replace(self, splits=splits).where(np.argsort(rank, kind="stable"))

    def where(self, rows: np.ndarray) -> Self:
        """Some of the images: bool (N,), or indices."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        groups = None if self.groups is None else self.groups[rows]
        names = [self.names[row] for row in rows.tolist()]
        return replace(self, names=names, labels=self.labels[rows], splits=self.splits[rows], groups=groups)

    def lines(self) -> list[str]:
        """What a person should know of it, a line each: files and columns that aren't used, and splits that were given."""
        lines = [line] if (line := left_out_line(self.place, self.left_out)) else []
        if self.unused:
            lines.append(f"columns of {self.place.name} not used: {first_names(self.unused, MAX_LISTED)}")
        if self.has(VALIDATION):
            count = int((self.splits == VALIDATION).sum())
            lines.append(f"{self.place.name} has a validation split of its own, {count:,} images: none is drawn")
        return lines


Counts = Mapping[str, Mapping[str, int]]  # split -> class -> images


def check_classes(counts: Counts, subject: Callable[[str, str], str], remedy: str) -> None:
    """DataError where there are fewer than two classes, a class has too few images, or a split knows others than training.

    `subject` words a class in a split, or a split where the class is empty; `remedy` is for too few classes.
    """
    train = counts[TRAIN]
    if len(train) < 2:
        few = "one class" if train else "no class"
        raise DataError(subject(TRAIN, ""), f"holds {few}, needs at least 2", remedy)
    problems = [
        Problem(
            subject(TRAIN, name),
            f"holds {count} image(s), needs at least 2",
            f"add some ({' '.join(SUFFIXES)}) or remove it",
        )
        for name, count in train.items()
        if count < 2
    ]
    problems += [
        Problem(
            subject(split, name),
            f"no such class in {subject(TRAIN, '')}{did_you_mean(name, train)}",
            "rename or remove it",
        )
        for split, classes in counts.items()
        for name in classes
        if name not in train
    ]
    if problems:
        raise DataError.many(first(problems))


def check_names(where: Path, names: Sequence[str]) -> None:
    """DataError for class names that no file or database takes."""
    # Bytes that aren't UTF-8 become surrogates in Python.
    refused = [name for name in names if any(c < " " or "\ud800" <= c <= "\udfff" for c in name)]
    if refused:
        remedy = "rename it, without control characters, in UTF-8"
        raise DataError.many(first([Problem(f"{where}: class {name!a}", remedy=remedy) for name in refused]))


def check_inside(root: Path, files: Sequence[str]) -> None:
    """DataError, a problem for each of the images that leads out of the data set: figures in reports show them."""
    real = os.path.realpath(root)

    @cache
    def is_inside(target: str) -> bool:
        return os.path.commonpath([real, os.path.realpath(target)]) == real

    outside = [file for file in files if not is_inside(file if os.path.islink(file) else os.path.dirname(file))]
    if outside:
        remedy = "copy the images into it, or give the folder where they lie"
        raise DataError.many(first([Problem(file, f"leads out of {root}", remedy) for file in outside]))


def check_groups(listing: Listing, remedy: str) -> None:
    """DataError where images of one group are in two splits."""
    if listing.groups is None:
        return
    splits: dict[str, set[str]] = {}
    for group, split in zip(listing.groups.tolist(), listing.splits.tolist(), strict=True):
        splits.setdefault(group, set()).add(split)
    problems = [
        Problem(f"{listing.place.name}, group {group}", f"is in {' and '.join(sorted(found, key=ORDER.index))}", remedy)
        for group, found in sorted(splits.items())
        if len(found) > 1
    ]
    if problems:
        raise DataError.many(first(problems))


def first(problems: list[Problem]) -> list[Problem]:
    """As many as an error lists, and how many more there are."""
    more = len(problems) - MAX_LISTED
    return [*problems[:MAX_LISTED], Problem(f"and {more} more")] if more > 0 else problems
