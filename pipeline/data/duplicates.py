"""Images that are the same, or nearly: saved again, at another quality or size.

Nearly the same are two images whose perceptual hashes differ in at most MAX_BITS of 64 bits, and whose thumbnails differ
little: the hash finds candidates among all pairs, the thumbnails confirm them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

HASHED = 32  # height and width in pixels of what is hashed
THUMBNAIL = 16  # of what is compared
MAX_BITS = 6
MAX_DIFFERENCE = 10.0  # root mean square between thumbnails, of 255 levels
MAX_RELATIVE = 0.3  # the same, by the thumbnails' own standard deviation: two images of plain sky aren't the same
_BANDS = MAX_BITS + 1  # parts of a hash: of two that differ in MAX_BITS at most, one is equal
_PAIRS_AT_ONCE = 2**21


@dataclass(frozen=True, eq=False)
class Fingerprints:
    """Of N images, what tells whether two are the same."""

    digests: Sequence[bytes]  # SHA-256 of each file, or of its pixels where there are no files
    hashes: np.ndarray  # uint64 (N,)
    thumbnails: np.ndarray  # uint8 (N, 3, THUMBNAIL, THUMBNAIL)


@dataclass(frozen=True, eq=False)
class Duplicates:
    """N images in groups of the same picture; an image without another is a group of its own."""

    groups: np.ndarray  # int64 (N,): a number for each image
    exact: np.ndarray  # int64 (N,): the same of those that are equal byte for byte

    def sets(self) -> list[np.ndarray]:
        """The indices of each group of two and more images, ascending."""
        order = np.argsort(self.groups, kind="stable")
        parts = np.split(order, np.flatnonzero(np.diff(self.groups[order])) + 1)
        return sorted((part for part in parts if len(part) > 1), key=lambda part: part[0])


def perceptual_hashes(images: np.ndarray) -> np.ndarray:
    """uint64 (N,) of uint8 (N, 3, HASHED, HASHED): which of the 64 lowest frequencies are above their median (pHash)."""
    from scipy.fft import dctn

    grey = np.tensordot(images.astype(np.float32), np.array([0.299, 0.587, 0.114], np.float32), (1, 0))
    low = np.rint(
        dctn(grey, axes=(1, 2), norm="ortho")[:, :8, :8].reshape(-1, 64)
    )  # rounded: plain images have no noise
    bits = low > np.median(low[:, 1:], axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def thumbnails(images: np.ndarray) -> np.ndarray:
    """uint8 (N, 3, THUMBNAIL, THUMBNAIL) of uint8 (N, 3, HASHED, HASHED): means of pixels."""
    by = HASHED // THUMBNAIL
    means = images.reshape(-1, 3, THUMBNAIL, by, THUMBNAIL, by).mean((3, 5), dtype=np.float32)
    return np.rint(means).astype(np.uint8)


def exact_groups(digests: Sequence[bytes]) -> np.ndarray:
    """int64 (N,): the same number for equal digests, that of the first."""
    first: dict[bytes, int] = {}
    return np.array([first.setdefault(digest, index) for index, digest in enumerate(digests)], dtype=np.int64)


def find_duplicates(prints: Fingerprints) -> Duplicates:
    """Exact and near ones; near is passed on, so that a burst of photos is one group."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    exact = exact_groups(prints.digests)
    distinct = np.unique(exact)
    near = distinct[_near_pairs(prints.hashes[distinct], prints.thumbnails[distinct])]
    pairs = np.concatenate([np.stack([exact, np.arange(len(exact))], axis=1), near])
    graph = coo_array((np.ones(len(pairs), dtype=bool), (pairs[:, 0], pairs[:, 1])), shape=(len(exact),) * 2)
    return Duplicates(connected_components(graph, directed=False)[1].astype(np.int64), exact)


def _near_pairs(hashes: np.ndarray, small: np.ndarray) -> np.ndarray:
    """int64 (P, 2): indices of those that are nearly the same.

    Candidates are confirmed block by block: thousands of plain images have one hash, and millions of pairs that aren't.
    """
    found = [np.empty((0, 2), dtype=np.int64)]
    width = 64 // _BANDS
    keys = [hashes >> np.uint64(band * width) & np.uint64(2**width - 1) for band in range(_BANDS)]
    for band, of_band in enumerate(keys):
        order = np.argsort(of_band, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(of_band[order])) + 1):
            for candidates in _candidates(hashes[rows]):
                pairs = rows[candidates]
                for earlier in keys[:band]:
                    pairs = pairs[earlier[pairs[:, 0]] != earlier[pairs[:, 1]]]  # the others were found there
                found.append(pairs[_is_near(small, pairs)])
    return np.concatenate(found)


def _candidates(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """int64 (P, 2) indices of hashes that differ in few bits, block by block: all pairs at once may not fit in memory."""
    step = max(_PAIRS_AT_ONCE // len(hashes), 1)
    for start in range(0, len(hashes) - 1, step):
        differing = np.bitwise_count(hashes[start : start + step, None] ^ hashes[None, start + 1 :])
        first, second = np.nonzero(differing <= MAX_BITS)
        is_later = second >= first
        yield start + np.stack([first[is_later], second[is_later] + 1], axis=1)


def _is_near(small: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """bool (P,) of pairs of thumbnails, int64 (P, 2)."""
    flat = small.reshape(len(small), 3 * THUMBNAIL**2)
    result = np.empty(len(pairs), dtype=bool)
    for start in range(0, len(pairs), 4096):
        one, other = (flat[indices].astype(np.float32) for indices in pairs[start : start + 4096].T)
        difference = np.sqrt(((one - other) ** 2).mean(axis=1))
        contrast = np.minimum(one.std(axis=1), other.std(axis=1))
        result[start : start + 4096] = (difference <= MAX_DIFFERENCE) & (difference <= MAX_RELATIVE * contrast)
    return result
