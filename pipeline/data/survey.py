"""A look at all images of a data set before anything is trained: sizes, pixel modes, damage, fingerprints."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from torch import Tensor

from pipeline.data.duplicates import HASHED, THUMBNAIL, Fingerprints, perceptual_hashes, thumbnails
from pipeline.data.images import BadImage, read_file, read_header, resized
from pipeline.data.listing import Listing
from pipeline.sections.data import Form

_BATCH = 1024  # images that are hashed at once


class Unreadable(NamedTuple):
    """A file that is no usable image."""

    name: str
    label: int
    split: str
    reason: str


@dataclass(frozen=True, eq=False)
class Survey:
    """N images that can be read, and the files that can't."""

    names: np.ndarray  # str (N,): paths below the data set's root, or numbers
    labels: np.ndarray  # int64 (N,), indices into the data set's classes
    splits: np.ndarray  # str (N,)
    sizes: np.ndarray  # int32 (N, 2): width and height in pixels, as they are shown
    kinds: np.ndarray  # str (N,): `JPEG RGB`
    peaks: np.ndarray  # float64 (N,): the highest value of 12- and 16-bit grey by the highest there can be; of others 1
    prints: Fingerprints
    unreadable: tuple[Unreadable, ...] = ()

    def with_splits(self, splits: np.ndarray) -> Self:
        """The same images in other splits."""
        return replace(self, splits=splits)

    def joined(self, other: Self) -> Self:
        """These images, then the other's."""
        arrays = ("names", "labels", "splits", "sizes", "kinds", "peaks")
        prints = Fingerprints(
            [*self.prints.digests, *other.prints.digests],
            np.concatenate([self.prints.hashes, other.prints.hashes]),
            np.concatenate([self.prints.thumbnails, other.prints.thumbnails]),
        )
        both = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in arrays}
        return replace(self, **both, prints=prints, unreadable=self.unreadable + other.unreadable)


def survey_files(listing: Listing) -> Survey:
    """Every image of a listing, decoded once, in the order of its rows."""
    looks = list(_looks(map(Path, listing.files)))
    rows = [row for row, look in enumerate(looks) if isinstance(look, _Look)]
    seen = [look for look in looks if isinstance(look, _Look)]
    unreadable = [
        Unreadable(listing.names[row], int(listing.labels[row]), str(listing.splits[row]), look.reason)
        for row, look in enumerate(looks)
        if isinstance(look, BadImage)
    ]
    return Survey(
        names=np.array(listing.names, dtype=object)[rows],
        labels=listing.labels[rows],
        splits=listing.splits[rows],
        sizes=np.array([look.size for look in seen], dtype=np.int32).reshape(-1, 2),
        kinds=np.array([look.kind for look in seen], dtype=object),
        peaks=np.array([look.peak for look in seen]),
        prints=Fingerprints(
            [look.sha256 for look in seen],
            np.array([look.hash for look in seen], dtype=np.uint64),
            np.array([look.thumbnail for look in seen], dtype=np.uint8).reshape(-1, 3, THUMBNAIL, THUMBNAIL),
        ),
        unreadable=tuple(unreadable),
    )


def survey_pixels(images: Tensor, labels: Tensor, split: str) -> Survey:
    """The same of uint8 (N, 3, S, S) that lie in no image files; numbers are their names."""
    height, width = images.shape[-2:]
    parts = [resized(part, Form(HASHED)).numpy() for part in images.split(_BATCH)]
    digests = [hashlib.sha256(image.numpy().tobytes()).digest() for image in images]
    hashes, small = (np.concatenate([take(part) for part in parts]) for take in (perceptual_hashes, thumbnails))
    return Survey(
        names=np.array([f"no. {number}" for number in range(len(labels))], dtype=object),
        labels=labels.numpy().astype(np.int64),
        splits=np.full(len(labels), split),
        sizes=np.tile(np.array([[width, height]], dtype=np.int32), (len(labels), 1)),
        kinds=np.full(len(labels), "pixels", dtype=object),
        peaks=np.ones(len(labels)),
        prints=Fingerprints(digests, hashes, small),
    )


class _Look(NamedTuple):
    size: tuple[int, int]
    kind: str
    peak: float
    hash: np.uint64
    thumbnail: np.ndarray
    sha256: bytes


def _looks(paths: Iterable[Path]) -> Iterator[_Look | BadImage]:
    def look(path: Path) -> _Look | BadImage:
        try:
            file = read_file(path, Form(HASHED), digest=True)
        except BadImage as error:
            return BadImage(error.path, error.reason)  # the caught one's traceback holds the half-read image
        header = read_header(path)
        assert header, "it was decoded"
        image = file.image[None]
        return _Look(
            header.size, header.kind, file.peak, perceptual_hashes(image)[0], thumbnails(image)[0], file.sha256
        )

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(look, paths)
