"""Images of a listing that aren't used: copies of sealed ones, which would make the test lie, and files that can't be read."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.listing import TEST, TRAIN, Listing, first
from pipeline.errors import DataError, Problem

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Excluded:
    """An image that isn't used, by its path below the data set's root, and why."""

    name: str
    reason: str


def excluded_table(excluded: Sequence[Excluded]) -> "pd.DataFrame":
    """Columns path and reason."""
    import pandas as pd

    return pd.DataFrame([(one.name, one.reason) for one in excluded], columns=["path", "reason"])


def test_copies(listing: Listing) -> dict[int, str]:
    """Row of an image that may train or validate -> name of a sealed one that is equal to it, byte for byte.

    Only files of equal size are read, and no image is decoded. DataError where a file can't be read.
    """
    is_test = listing.splits == TEST
    if not is_test.any():
        return {}
    try:
        sizes = np.array([os.stat(path).st_size for path in listing.paths])
        rows = np.flatnonzero(np.isin(sizes, np.intersect1d(sizes[is_test], sizes[~is_test])))
        digests = dict(zip(rows.tolist(), file_digests([listing.paths[row] for row in rows]), strict=True))
    except OSError as error:
        raise DataError(str(error.filename), error.strerror or str(error)) from None
    sealed = {digest: listing.names[row] for row, digest in digests.items() if is_test[row]}
    return {row: sealed[digest] for row, digest in digests.items() if not is_test[row] and digest in sealed}


def file_digests(paths: Sequence[Path]) -> list[bytes]:
    """SHA-256 of each file; OSError where one can't be read."""

    def digest(path: Path) -> bytes:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(digest, paths))


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
