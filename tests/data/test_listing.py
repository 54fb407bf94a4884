"""The rows of a data set of files, whoever lists them."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.listing import TEST, TRAIN, Listing, check_names
from pipeline.errors import DataError


@pytest.fixture
def listing(tmp_path: Path) -> Listing:
    names = ["cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"]
    return Listing(
        place=tmp_path,
        classes=("cat", "dog"),
        names=names,
        labels=np.array([0, 0, 1, 1]),
        splits=np.array([TRAIN] * 4),
        groups=np.array(["b", "a", "b", "c"]),
        left_out=Counter({".txt": 2, "hidden or system": 1, ".heic": 0}),
    )


def test_sealed_rows_come_last_with_their_labels_and_groups(listing: Listing) -> None:
    sealed = listing.with_splits(np.array([TRAIN, TEST, TRAIN, TRAIN]))
    assert sealed.names == ["cat/1.png", "dog/1.png", "dog/2.png", "cat/2.png"]
    assert (sealed.usable.names, sealed.usable.labels.tolist()) == (sealed.names[:3], [0, 1, 1])
    assert sealed.sealed_part.groups is not None and sealed.sealed_part.groups.tolist() == ["a"]
    numbers = listing.group_numbers
    assert numbers is not None and numbers.tolist() == [1, 0, 1, 2]


def test_digest_of_the_test_split_is_that_of_its_names(listing: Listing) -> None:
    first = listing.with_splits(np.array([TRAIN, TEST, TRAIN, TRAIN]))
    second = listing.with_splits(np.array([TEST, TRAIN, TRAIN, TRAIN]))
    assert listing.test_digest is None and first.test_digest != second.test_digest
    assert first.with_splits(first.splits).test_digest == first.test_digest


def test_what_is_left_out_is_one_line(listing: Listing) -> None:
    assert listing.lines() == [f"left out of {listing.place}: 1 hidden or system, 2 .txt"]


@pytest.mark.parametrize("name", ["a\nb", "\udcff"])
def test_class_names_that_no_database_takes_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rename it, without control characters, in UTF-8"):
        check_names(tmp_path, ["cat", name])
