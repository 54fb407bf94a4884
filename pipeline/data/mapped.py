"""Images in a file, of which a training reads a batch at a time."""

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from pipeline.data.ahead import ahead

CPU = torch.device("cpu")
READ_AT_ONCE = 1000  # images
BATCHES_AHEAD = 2  # that wait, in pinned memory for a GPU, while a step computes


def sums_of(pixels: np.ndarray) -> np.ndarray:
    """int64 (N, 2, 3): of each channel of images uint8 (N, 3, S, S), the sum of its pixels and of their squares."""
    flat = pixels.reshape(len(pixels), 3, -1)
    return np.stack([flat.sum(2, dtype=np.int64), np.einsum("ncp,ncp->nc", flat, flat, dtype=np.int64)], axis=1)


class PixelFile:
    """A file of uint8 images (3, S, S), one after the other, in memory only while it is read.

    A file that is removed while it is open stays readable.
    """

    def __init__(self, path: Path, size: int):
        """OSError where it can't be opened."""
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes = 3 * size**2  # of an image
        whole = len(self._map) // self._bytes
        self._images = np.frombuffer(self._map, np.uint8, whole * self._bytes).reshape(whole, 3, size, size)
        # What lies around an image is not wanted with it: without this, random images cost up to 90 times their bytes.
        self._map.madvise(mmap.MADV_RANDOM)

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy the images `rows`, int64 (B,), to `out`, uint8 (B, 3, S, S)."""
        for start in range(0, len(rows), READ_AT_ONCE):
            self._read(rows[start : start + READ_AT_ONCE], out[start : start + READ_AT_ONCE])

    def _read(self, rows: np.ndarray, out: np.ndarray) -> None:
        for row in rows.tolist():  # the disk gets all requests at once
            begin = row * self._bytes // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, begin, (row + 1) * self._bytes - begin)
        np.take(self._images, rows, axis=0, out=out, mode="clip")  # without the GIL; "raise" would copy once more
        self._map.madvise(mmap.MADV_DONTNEED)  # from this process's memory, not from the system's cache


@dataclass(frozen=True, eq=False)
class MappedImages:
    """N images of a file, in any order. Its methods are those of a uint8 tensor (N, 3, S, S) on `device`, if slower."""

    file: PixelFile
    size: int
    rows: np.ndarray  # int64 (N,), in the file
    sums: np.ndarray  # int64 (N, 2, 3), see `sums_of`
    device: torch.device = CPU

    @property
    def shape(self) -> torch.Size:
        """(N, 3, S, S)"""
        return torch.Size((len(self.rows), 3, self.size, self.size))

    @property
    def nbytes(self) -> int:
        """As a tensor."""
        return self.shape.numel()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: Tensor | slice) -> Tensor:
        """Some of the images, on the device."""
        return self._read(chosen).to(self.device, non_blocking=True)

    def at(self, chosen: Tensor | slice) -> Self:
        """Some of the images, which stay in the file."""
        index = chosen.numpy() if isinstance(chosen, Tensor) else chosen
        return replace(self, rows=self.rows[index], sums=self.sums[index])

    def on(self, device: torch.device) -> Self:
        """The same, read to another device."""
        return replace(self, device=device)

    def batches(self, indices: Iterable[Tensor]) -> Iterator[Tensor]:
        """The images of each of `indices`, int64 (B,), read by a thread while the ones before are used."""
        for images in ahead(self._read, indices, threads=1, depth=BATCHES_AHEAD):
            yield images.to(self.device, non_blocking=True)  # by the caller's stream

    def split(self, count: int) -> Iterator[Tensor]:
        """The images in their order, `count` at a time."""
        return self.batches(self._positions.split(count))

    def _read(self, chosen: Tensor | slice) -> Tensor:
        """Some of the images on the host, in pinned memory for a GPU."""
        rows = self.rows[chosen.cpu().numpy() if isinstance(chosen, Tensor) else chosen]
        pinned = self.device.type == "cuda"
        images = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8, pin_memory=pinned)
        self.file.read(rows, images.numpy())
        return images

    @cached_property
    def _positions(self) -> Tensor:
        return torch.arange(len(self))
