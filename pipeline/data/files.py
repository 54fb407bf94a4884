"""The images of a listing -> pixels, and how large they are."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from pipeline.data.exclusions import COPY, Excluded, check_enough, test_copies
from pipeline.data.images import BadImage, HeldImages, LabelledImages, check_memory, read_header, read_images
from pipeline.data.listing import VALIDATION, Listing, first
from pipeline.errors import DataError, Problem
from pipeline.recipe import Form

PROGRESS_S = 10.0  # between two lines of progress
MAX_LOOKED_AT = 200  # images whose sizes a default goes by

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Decoded:
    """Images of files, without those that can't be read."""

    rows: np.ndarray  # int64 (N,): which of the paths these are
    images: Tensor  # uint8 (N, 3, S, S)
    held: HeldImages | None  # what random crops are cut from
    digests: Sequence[bytes]  # SHA-256 of each file
    unreadable: Sequence[BadImage] = ()

    def at(self, chosen: np.ndarray) -> Self:
        """Some of the images, int64 (K,)."""
        if len(chosen) == len(self.rows):
            return self
        held = self.held and HeldImages(self.held.images[chosen], self.held.aspects[chosen])
        digests = [self.digests[index] for index in chosen]
        return replace(self, rows=self.rows[chosen], images=self.images[chosen], held=held, digests=digests)


@dataclass(frozen=True, eq=False)
class ReadFiles:
    """The images of a listing that may train or validate, and what the files say of them."""

    labelled: LabelledImages
    listing: Listing  # without what is excluded
    digests: Sequence[bytes]  # SHA-256 of each image's file
    excluded: tuple[Excluded, ...]
    num_test_copies: int  # images that are in the test split, too, and were kept


def read(listing: Listing, form: Form, duplicates: str = "drop", corrupt: str = "refuse") -> ReadFiles:
    """The images that may train or validate; without copies of test images, unless duplicates are to be kept.

    DataError where a file can't be read, unless corrupt ones are skipped, and where a class is left with too few images.
    """
    usable, keeps = listing.usable, duplicates == "keep"
    check_memory(len(usable.paths), form)
    found = decoded(usable.paths, form, corrupt == "skip")
    excluded = [Excluded(image.path.relative_to(listing.root).as_posix(), image.reason) for image in found.unreadable]
    copied = test_copies(listing, found.digests)
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
    paths = listing.usable.paths
    headers = map(read_header, paths[:: math.ceil(len(paths) / MAX_LOOKED_AT)])
    sizes = [header.size for header in headers if header]
    if not sizes:
        return None
    widths, heights = np.array(sizes).T
    elongation = np.median(np.maximum(widths, heights) / np.minimum(widths, heights))
    return Sizes(len(sizes), int(np.median(widths)), int(np.median(heights)), float(elongation))


def decoded(paths: Sequence[Path], form: Form, skip: bool = False) -> Decoded:
    """The images of these files; one DataError for all that can't be read, unless they may be skipped."""
    log.info("reading %s images at %d x %d pixels, %s", f"{len(paths):,}", form.size, form.size, form.geometry)
    said = time.monotonic()
    images = np.empty((len(paths), 3, form.size, form.size), dtype=np.uint8)
    held = np.empty((len(paths), 3, form.held or 0, form.held or 0), dtype=np.uint8)
    aspects, digests = torch.ones(len(paths)), list[bytes]()
    rows, unreadable = list[int](), list[BadImage]()
    for row, result in enumerate(read_images(paths, form, digests=True)):
        if time.monotonic() - said > PROGRESS_S:
            log.info("%s of %s images read", f"{row:,}", f"{len(paths):,}")
            said = time.monotonic()
        if isinstance(result, BadImage):
            unreadable.append(result)
            continue
        index = len(rows)
        rows.append(row)
        digests.append(result.sha256)
        images[index], aspects[index] = result.image, result.aspect
        if result.held is not None:
            held[index] = result.held
    if unreadable and not skip:
        problems = first([problem for image in unreadable for problem in image.problems])
        remedy = "replace or remove them, or `--corrupt skip` leaves them out"
        raise DataError.many(
            [*problems, Problem(f"{len(unreadable)} of {len(paths)} images can't be used", remedy=remedy)]
        )
    count = len(rows)
    to_crop = HeldImages(torch.from_numpy(held[:count]), aspects[:count]) if form.held else None
    return Decoded(np.array(rows, dtype=np.int64), torch.from_numpy(images[:count]), to_crop, digests, unreadable)
