"""Data sets in memory: pixels and labels with a digest, from one of SOURCES or from a folder of images.

Only images that may train and validate are read here; the test split stays closed (see `splits.py`).
To add a data set, write a module like `digits.py`, enter it in SOURCES, and let `registry/test_split.py` open its test
split.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pipeline.data import cifar10, digits, folder
from pipeline.data.images import LabelledImages
from pipeline.errors import DataError, UserError, did_you_mean
from pipeline.recipe import Form

SUFFIX_DIGITS = 6  # hexadecimal digits of a folder's digest in its name


class Source(Protocol):
    """A module that reads a data set with a name."""

    NATURAL_SIZE: int  # height and width in pixels that suit it

    def read(self, form: Form, data_dir: Path, download: bool) -> LabelledImages:
        """The images for training and validation, in a form; DataError where they are missing or damaged."""


SOURCES: dict[str, Source] = {"cifar10": cifar10, "digits": digits}


@dataclass(frozen=True, eq=False)
class Split:
    """`images` uint8 (N, 3, S, S), RGB; `labels` int64 (N,), indices into the data set's classes.

    `aspects`, float32 (N,), width by height, where the images are squashed ones that random crops are cut from.
    """

    images: Tensor
    labels: Tensor
    aspects: Tensor | None = None

    def at(self, chosen: Tensor | slice, device: torch.device | None = None) -> "Split":
        """Some of the images, contiguous, on a device."""
        aspects = None if self.aspects is None else self.aspects[chosen].to(device)
        return Split(self.images[chosen].contiguous().to(device), self.labels[chosen].contiguous().to(device), aspects)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory. `train` holds all that may train or validate, never a test image.

    `digest` is the SHA-256 of labels, class names, and pixels (at their natural size) or bytes of image files; so it is
    the same in every form. `name` is short and made of a-z, 0-9, _ and -; a
    folder's ends with the first digits of its digest, as many folders are called `data`. `source` says where the images
    were read from: an absolute path where they lie in files.
    """

    name: str
    classes: tuple[str, ...]
    train: Split  # as the network sees them when it is not trained on them
    digest: str
    source: str
    held: Split | None = None  # the same to be cut at random when they are trained on, where the form has them
    form: Form | None = None
    read: Callable[[Form], "Dataset"] | None = None  # the same data set in another form

    def at(self, form: Form) -> "Dataset":
        """The data set in a form: read again where it is another one."""
        return self if self.read is None or form == self.form else self.read(form)


def default_image_size(dataset: str) -> int | None:
    """The size in pixels that suits a data set; None for a folder, whose images may have any."""
    source = SOURCES.get(dataset)
    return source.NATURAL_SIZE if source else None


def load(dataset: str, form: Form, data_dir: Path, download: bool = True) -> Dataset:
    """Read a data set of SOURCES or the folder of that path, its images in a form.

    CIFAR-10 lies in `data_dir`, as torchvision's files; where it is missing, it is downloaded there if `download`.
    Raises DataError where the data is missing or damaged, UserError for an unknown name or too large images.
    """
    if source := SOURCES.get(dataset):
        name, read = dataset, source.read(form, data_dir.absolute(), download)
    else:
        root = existing_folder(dataset)
        read = folder.read(root, form)
        name = f"{folder.short_name(root)}-{read.digest[:SUFFIX_DIGITS]}"
    return Dataset(
        name=name,
        classes=read.classes,
        train=Split(read.images, read.labels),
        digest=read.digest,
        source=read.source,
        held=Split(read.held.images, read.labels, read.held.aspects) if read.held else None,
        form=form,
        read=partial(_load_same, dataset, data_dir.absolute(), read.digest),
    )


def _load_same(dataset: str, data_dir: Path, digest: str, form: Form) -> Dataset:
    """`load`; DataError where the data set is not what it was."""
    again = load(dataset, form, data_dir, download=False)
    if again.digest != digest:
        raise DataError(again.source, "its images changed while they were in use", "start again")
    return again


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
