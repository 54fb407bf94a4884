"""The images of a listing -> pixels, and how large they are."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.data.images import BadImage, HeldImages, LabelledImages, check_memory, read_images, shown_size
from pipeline.data.listing import VALIDATION, Listing, first
from pipeline.errors import DataError, Problem
from pipeline.recipe import Form

PROGRESS_S = 10.0  # between two lines of progress
MAX_LOOKED_AT = 200  # images whose sizes a default goes by

log = logging.getLogger(__name__)


def read(listing: Listing, form: Form) -> LabelledImages:
    """The images that may train or validate; the digest changes with what they show, their classes, splits and groups.

    DataError where a file can't be read.
    """
    usable = listing.usable
    check_memory(len(usable.paths), form)
    images, held, content = decoded(usable.paths, form)
    is_validation, groups = usable.splits == VALIDATION, usable.group_numbers
    about: list[object] = [list(usable.classes), usable.labels.tolist()]
    if is_validation.any() or groups is not None:  # a data set that has neither keeps the digest that it always had
        about += [is_validation.tolist(), None if groups is None else groups.tolist()]
    return LabelledImages(
        images=images,
        labels=torch.from_numpy(usable.labels),
        classes=usable.classes,
        source=str(listing.place),
        digest=hashlib.sha256(json.dumps(about).encode() + content).hexdigest(),
        held=held,
        is_validation=torch.from_numpy(is_validation) if is_validation.any() else None,
        groups=None if groups is None else torch.from_numpy(groups),
    )


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
    sizes = list(filter(None, map(shown_size, paths[:: math.ceil(len(paths) / MAX_LOOKED_AT)])))
    if not sizes:
        return None
    widths, heights = np.array(sizes).T
    elongation = np.median(np.maximum(widths, heights) / np.minimum(widths, heights))
    return Sizes(len(sizes), int(np.median(widths)), int(np.median(heights)), float(elongation))


def decoded(paths: Sequence[Path], form: Form) -> tuple[Tensor, HeldImages | None, bytes]:
    """uint8 (N, 3, S, S), what is held for random crops, and the digest of the files' bytes.

    One DataError for all the files that can't be read.
    """
    log.info("reading %s images at %d x %d pixels, %s", f"{len(paths):,}", form.size, form.size, form.geometry)
    said = time.monotonic()
    images = np.empty((len(paths), 3, form.size, form.size), dtype=np.uint8)
    held = np.empty((len(paths), 3, form.held or 0, form.held or 0), dtype=np.uint8)
    aspects, content = torch.ones(len(paths)), hashlib.sha256()
    problems: list[Problem] = []
    for index, result in enumerate(read_images(paths, form, digests=True)):
        if time.monotonic() - said > PROGRESS_S:
            log.info("%s of %s images read", f"{index:,}", f"{len(paths):,}")
            said = time.monotonic()
        if isinstance(result, BadImage):
            problems += result.problems
            continue
        images[index], aspects[index] = result.image, result.aspect
        content.update(result.sha256)
        if result.held is not None:
            held[index] = result.held
    if problems:
        summary = Problem(f"{len(problems)} of {len(paths)} images can't be used", remedy="replace or remove them")
        raise DataError.many([*first(problems), summary])
    to_crop = HeldImages(torch.from_numpy(held), aspects) if form.held else None
    return torch.from_numpy(images), to_crop, content.digest()
