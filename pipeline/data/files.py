"""The images of a listing -> pixels, and how large they are."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.data.cache import decoded, in_memory
from pipeline.data.exclusions import COPY, Excluded, check_enough, test_copies
from pipeline.data.images import LabelledImages, read_header
from pipeline.data.listing import TEST, VALIDATION, Listing
from pipeline.sections.data import Data, Form

MAX_LOOKED_AT = 200  # images whose sizes a default goes by


@dataclass(frozen=True, eq=False)
class ReadFiles:
    """The images of a listing that may train or validate, and what the files say of them."""

    labelled: LabelledImages
    listing: Listing  # without what is excluded
    digests: Sequence[bytes]  # SHA-256 of each image's file
    excluded: tuple[Excluded, ...]
    num_test_copies: int  # images that are in the test split, too, and were kept


def read(listing: Listing, form: Form, about: Data, home: Path | None = None) -> ReadFiles:
    """The images that may train or validate; without copies of test images, unless duplicates are to be kept.

    They are decoded once, to the cache in `home` where that is given. DataError where a file can't be read, unless corrupt
    ones are skipped, and where a class is left with too few images.
    """
    usable, keeps, skip = listing.usable, about.duplicates == "keep", about.corrupt == "skip"
    found = decoded(usable, form, home, skip) if home else in_memory(usable, form, skip)
    excluded = [Excluded(image.path.relative_to(listing.root).as_posix(), image.reason) for image in found.unreadable]
    copied = test_copies(listing, found.digests, skip)
    if not keeps:
        excluded += [Excluded(usable.names[found.rows[index]], f"{COPY} {name}") for index, name in copied.items()]
        found = found.at(np.setdiff1d(np.arange(len(found.rows)), list(copied)))
    usable = usable.where(found.rows)
    if excluded:
        listing = listing.where(~np.isin(np.array(listing.names), [one.name for one in excluded]))
        check_enough(listing, excluded)
    is_validation, groups = usable.splits == VALIDATION, usable.group_numbers
    labelled = LabelledImages(
        images=found.images,
        labels=torch.from_numpy(usable.labels),
        classes=usable.classes,
        source=str(listing.place),
        digest=digest_of(usable, found.digests),
        held=found.held,
        is_validation=torch.from_numpy(is_validation) if is_validation.any() else None,
        groups=None if groups is None else torch.from_numpy(groups),
    )
    return ReadFiles(labelled, listing, found.digests, tuple(excluded), len(copied) if keeps else 0)


def digest_of(usable: Listing, digests: Sequence[bytes]) -> str:
    """Of a data set, by the SHA-256 of each file that may train or validate, their classes, splits and groups."""
    about: list[object] = [list(usable.classes), usable.labels.tolist()]
    is_validation, groups = usable.splits == VALIDATION, usable.group_numbers
    if is_validation.any() or groups is not None:  # a data set that has neither keeps the digest that it always had
        about += [is_validation.tolist(), None if groups is None else groups.tolist()]
    content = hashlib.sha256(b"".join(digests)).digest()
    return hashlib.sha256(json.dumps(about).encode() + content).hexdigest()


@dataclass(frozen=True)
class Sizes:
    """Of the images of a data set, as far as they were looked at; medians, in pixels as they are shown."""

    num_images: int
    width: int
    height: int
    elongation: float  # long side by short side


def look(listing: Listing) -> Sizes | None:
    """The sizes of some images that may train or validate, without decoding them; None where none can be read."""
    rows = np.flatnonzero(listing.splits != TEST)
    some = listing.where(rows[:: math.ceil(len(rows) / MAX_LOOKED_AT)])
    headers = (read_header(Path(file)) for file in some.files)
    sizes = [header.size for header in headers if header]
    if not sizes:
        return None
    widths, heights = np.array(sizes).T
    elongation = np.median(np.maximum(widths, heights) / np.minimum(widths, heights))
    return Sizes(len(sizes), int(np.median(widths)), int(np.median(heights)), float(elongation))
