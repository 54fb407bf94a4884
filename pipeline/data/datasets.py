"""Data sets in memory: pixels and labels with a digest, from one of SOURCES or from a folder of images.

Only images that may train and validate are read here; the test split stays closed (see `splits.py`).
To add a data set, write a module like `digits.py`, enter it in SOURCES, and let `registry/test_split.py` open its test
split.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from pipeline.data import cifar10, digits, folder
from pipeline.data.images import LabelledImages
from pipeline.errors import DataError, UserError, did_you_mean

SUFFIX_DIGITS = 6  # hexadecimal digits of a folder's digest in its name


class Source(Protocol):
    """A module that reads a data set with a name."""

    NATURAL_SIZE: int  # height and width in pixels that suit it

    def read(self, image_size: int, data_dir: Path, download: bool) -> LabelledImages:
        """The images for training and validation, resized; DataError where they are missing or damaged."""


SOURCES: dict[str, Source] = {"cifar10": cifar10, "digits": digits}


@dataclass(frozen=True, eq=False)
class Split:
    """`images` uint8 (N, 3, S, S), RGB; `labels` int64 (N,), indices into the data set's classes."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory. `train` holds all that may train or validate, never a test image.

    `digest` is the SHA-256 of shapes, pixels, labels and class names. `name` is short and made of a-z, 0-9, _ and -; a
    folder's ends with the first digits of its digest, as many folders are called `data`. `source` says where the images
    were read from: an absolute path where they lie in files.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    digest: str
    source: str


def default_image_size(dataset: str) -> int | None:
    """The size in pixels that suits a data set; None for a folder, whose images may have any."""
    source = SOURCES.get(dataset)
    return source.NATURAL_SIZE if source else None


def load(dataset: str, image_size: int, data_dir: Path, download: bool = True) -> Dataset:
    """Read a data set of SOURCES or the folder of that path, its images resized to image_size x image_size.

    CIFAR-10 lies in `data_dir`, as torchvision's files; where it is missing, it is downloaded there if `download`.
    Raises DataError where the data is missing or damaged, UserError for an unknown name or too large images.
    """
    assert image_size > 0, image_size
    if source := SOURCES.get(dataset):
        read = source.read(image_size, data_dir.absolute(), download)
        return _dataset(dataset, read, _digest(read))
    root = existing_folder(dataset)
    read = folder.read(root, image_size)
    digest = _digest(read)
    return _dataset(f"{folder.short_name(root)}-{digest[:SUFFIX_DIGITS]}", read, digest)


def existing_folder(dataset: str) -> Path:
    """The folder of this path; DataError, or UserError for what is more like a mistyped name, where there is none."""
    root = Path(os.path.abspath(os.path.expanduser(dataset)))
    try:
        if root.is_dir():
            return root
        exists = root.exists()
    except OSError as error:
        raise DataError(str(error.filename), error.strerror or "") from error
    subject, known = f"data.dataset = {dataset}", f"{', '.join(SOURCES)}, or the path of a folder with train/<class>/*"
    if exists:
        raise DataError(subject, "not a folder", f"give one of {known}")
    if os.sep in dataset:
        raise DataError(subject, "no such folder", f"give one of {known}")
    raise UserError(subject, f"not one of {known}{did_you_mean(dataset, SOURCES)}")


def _dataset(name: str, read: LabelledImages, digest: str) -> Dataset:
    return Dataset(name, read.classes, Split(read.images, read.labels), digest, read.source)


def _digest(read: LabelledImages) -> str:
    header = json.dumps([read.classes, list(read.images.shape), list(read.labels.shape)])
    digest = hashlib.sha256(header.encode())
    digest.update(read.images.numpy().data)
    digest.update(read.labels.numpy().astype("<i8").data)
    return digest.hexdigest()
