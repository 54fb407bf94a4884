"""The images of a listing -> pixels, and how large they are."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.data.cache import decoded, in_memory
from pipeline.data.images import LabelledImages, shown_size
from pipeline.data.listing import VALIDATION, Listing
from pipeline.recipe import Form

MAX_LOOKED_AT = 200  # images whose sizes a default goes by


def read(listing: Listing, form: Form, home: Path | None = None) -> LabelledImages:
    """The images that may train or validate; the digest changes with what they show, their classes, splits and groups.

    They are decoded once, to the cache in `home` where that is given. DataError where a file can't be read.
    """
    usable = listing.usable
    images, held, content = decoded(usable, form, home) if home else in_memory(usable, form)
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
