"""Images of a listing that aren't used: copies of sealed ones, which would make the test lie, and files that can't be read."""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.listing import TEST, TRAIN, Listing, first
from pipeline.disk import sha256_of
from pipeline.errors import DataError, Problem, path_text

if TYPE_CHECKING:
    import pandas as pd


COPY = "copy of the test image"  # how the reason of such an image begins
MISSING = -1  # in place of a file's size


@dataclass(frozen=True)
class Excluded:
    """An image that isn't used, by its path below the data set's root, and why."""

    name: str
    reason: str


def excluded_table(excluded: Sequence[Excluded]) -> "pd.DataFrame":
    """Columns path and reason, in valid UTF-8."""
    import pandas as pd

    rows = [(path_text(one.name), path_text(one.reason)) for one in excluded]
    return pd.DataFrame(rows, columns=["path", "reason"])


def test_copies(listing: Listing, digests: Sequence[bytes], skip: bool) -> dict[int, str]:
    """Index of an image that may train or validate -> name of a sealed one that is equal to it, byte for byte.

    `digests`: SHA-256 of the files of those that may. Of sealed images only the bytes are read, and only where another
    file has the same size. DataError where one can't be read; with `skip` it is a copy of nothing.
    """
    is_test = listing.splits == TEST
    if not is_test.any():
        return {}
    files = listing.files
    try:
        sizes = np.array([_size(file, skip) for file in files])
        rows = np.flatnonzero(is_test & np.isin(sizes, sizes[~is_test]) & (sizes != MISSING)).tolist()
        sealed = dict(zip(file_digests([files[row] for row in rows], skip), rows, strict=True))
    except OSError as error:
        remedy = "bring it back or remove it, or `--corrupt skip` leaves it out"
        raise DataError(str(error.filename), error.strerror or str(error), remedy) from None
    return {index: listing.names[sealed[digest]] for index, digest in enumerate(digests) if digest in sealed}


def _size(file: str, skip: bool) -> int:
    try:
        return os.stat(file).st_size
    except OSError:
        if skip:
            return MISSING
        raise


def file_digests(files: Sequence[str], skip: bool = False) -> list[bytes]:
    """SHA-256 of each file; OSError where one can't be read, with `skip` nothing, b""."""

    def digest(file: str) -> bytes:
        try:
            return bytes.fromhex(sha256_of(file))
        except OSError:
            if skip:
                return b""
            raise

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(digest, files))


def check_enough(listing: Listing, excluded: Sequence[Excluded]) -> None:
    """DataError for each class that has too few images to train on without those that are left out."""
    counts = Counter(listing.labels[listing.splits == TRAIN].tolist())
    problems = [
        Problem(
            f"{listing.place}, class {name}",
            f"holds {counts[label]} image(s) besides those that are left out, needs at least 2",
            "add some, or remove the class",
        )
        for label, name in enumerate(listing.classes)
        if counts[label] < 2
    ]
    if problems:
        examples = tuple(f"{one.name}: {one.reason}" for one in excluded[:3])
        summary = Problem(f"{len(excluded)} images are left out", details=examples)
        raise DataError.many([*first(problems), summary])
