"""Data sets: pixels and labels with a digest, from one of SOURCES, a folder of images or a manifest.

Only images that may train and validate are read here; the test split stays closed (see `splits.py`).
To add a data set, write a module like `digits.py`, enter it in SOURCES, and let `registry/test_split.py` open its test
split.
"""

import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.data import cifar10, digits
from pipeline.data.duplicates import exact_groups
from pipeline.data.exclusions import COPY, Excluded
from pipeline.data.files import read as read_files
from pipeline.data.folder import read_folder
from pipeline.data.images import LabelledImages
from pipeline.data.listing import MANIFESTS, TEST, Listing
from pipeline.data.manifest import read_manifest
from pipeline.data.mapped import MappedImages
from pipeline.data.seal import Seal
from pipeline.errors import DataError, UserError, counted, did_you_mean
from pipeline.sections.data import Data, Form

MAX_NAMED = 5  # classes in a line
MAX_IMBALANCE = 10  # the largest class by the smallest, beyond which a person is told
SUFFIX_DIGITS = 6  # hexadecimal digits of a folder's digest in its name


class Source(Protocol):
    """A module that reads a data set with a name."""

    NATURAL_SIZE: int  # height and width in pixels that suit it

    def read(self, form: Form, data_dir: Path, download: bool) -> LabelledImages:
        """The images for training and validation, in a form; DataError where they are missing or damaged."""


SOURCES: dict[str, Source] = {"cifar10": cifar10, "digits": digits}
DOWNLOADED = ("cifar10",)  # those of them that lie in the folder of downloaded data sets


@dataclass(frozen=True, eq=False)
class Split:
    """`images` uint8 (N, 3, S, S), RGB; `labels` int64 (N,), indices into the data set's classes.

    `aspects`, float32 (N,), width by height, where the images are squashed ones that random crops are cut from.
    """

    images: Tensor | MappedImages
    labels: Tensor
    aspects: Tensor | None = None

    def at(self, chosen: Tensor | slice) -> "Split":
        """Some of the images; those in a file stay there."""
        images = self.images.at(chosen) if isinstance(self.images, MappedImages) else self.images[chosen].contiguous()
        aspects = None if self.aspects is None else self.aspects[chosen]
        return Split(images, self.labels[chosen].contiguous(), aspects)

    def on(self, device: torch.device, in_memory: bool = True) -> "Split":
        """On a device; its images, if not `in_memory`, only when they are asked for."""
        images = self.images[:] if isinstance(self.images, MappedImages) and in_memory else self.images
        images = images.on(device) if isinstance(images, MappedImages) else images.to(device)
        return Split(images, self.labels.to(device), None if self.aspects is None else self.aspects.to(device))


@dataclass(frozen=True, eq=False)
class Listed:
    """The listing of a data set of files, with its test split, and the seal where that was drawn."""

    listing: Listing  # without what is excluded
    seal: Seal | None
    excluded: tuple[Excluded, ...] = ()
    num_test_copies: int = 0  # images to train on that are in the test split, too, and were kept
    copies: np.ndarray | None = None  # int64 (N,) of those that may train or validate: the same for equal files

    def fix(self, home: Path) -> None:
        """Write which images are sealed, if they were drawn; see `Seal.fix`."""
        if self.seal:
            self.seal.fix(home, self.listing)

    def lines(self, validation: Tensor | None = None) -> list[str]:
        """What a person should know before it is used, a line each; `validation`: which of the images validate."""
        return [*self.facts(), *self._warnings(validation)]

    def facts(self) -> list[str]:
        """What its files and splits are, a line each."""
        return [*self.listing.lines(), *(self.seal.lines(self.listing) if self.seal else [])]

    def _warnings(self, validation: Tensor | None) -> Iterator[str]:
        """What makes scores worse, or better than they should be."""
        look = f"`inspect {shlex.quote(str(self.listing.place))}` shows them"
        if self.excluded:
            copies = sum(one.reason.startswith(COPY) for one in self.excluded)
            yield (
                f"images that aren't used: {len(self.excluded) - copies:,} that can't be read, {copies:,} that are in the "
                f"test split, too; {look}"
            )
        if self.num_test_copies:
            found = counted(self.num_test_copies, "training image")
            yield f"caution: {found} also in the test split; this flatters its scores"
        if self.copies is not None and (line := _copies_line(self.copies, self.listing.usable.labels, validation)):
            yield f"{line}; {look}"
        if validation is not None:
            measured = np.bincount(self.listing.usable.labels[validation.numpy()], minlength=len(self.listing.classes))
            if missing := [self.listing.classes[label] for label in np.flatnonzero(measured == 0)]:
                named = ", ".join(missing[:MAX_NAMED]) + ", ..." * (len(missing) > MAX_NAMED)
                yield f"no validation image of {named}: an F1 of 0 in macro-F1, whatever is predicted"
        counts = np.bincount(self.listing.usable.labels)
        if counts.max() >= MAX_IMBALANCE * counts.min():
            most, least = (
                f"{self.listing.classes[at]} has {counts[at]:,}" for at in (counts.argmax(), counts.argmin())
            )
            yield f"classes are unbalanced: {most} images, {least}; `--set data.sampler=balanced` evens them out"


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set. `train` holds all that may train or validate, never a test image.

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
    is_validation: Tensor | None = None  # bool (N,), where the data set says which images validate
    groups: Tensor | None = None  # int64 (N,): images with the same number never lie on two sides of a split
    listed: Listed | None = None  # what says which images there are, where they lie in files
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


def listed(about: Data, home: Path | None) -> Listed:
    """The folder or manifest of that path; its test split is drawn where it has none, unless one is fixed in `home`.

    DataError where it is missing or damaged, UserError where its images are too few, or another share of them is sealed.
    """
    place = existing_place(about.dataset)
    try:
        listing = read_manifest(place, about.column_names) if place.is_file() else read_folder(place)
    except OSError as error:
        raise DataError(str(error.filename), error.strerror or "") from error
    if listing.has(TEST) or not about.test_fraction:
        return Listed(listing, None)
    seal = (Seal.find(listing, home) if home else None) or Seal.draw(listing, about.test_fraction, home)
    if seal.fraction != about.test_fraction:
        raise UserError(
            f"data.test_fraction = {about.test_fraction:g}",
            f"the test split of {place} was drawn with {seal.fraction:g} and is sealed",
            f"`--test-fraction {seal.fraction:g}`",
        )
    return Listed(seal.apply(listing), seal)


def load(
    about: Data, data_dir: Path, home: Path | None = None, download: bool = True, found: Listed | None = None
) -> Dataset:
    """Read the data set of a recipe, one of SOURCES or a folder or manifest, its images in the recipe's form.

    CIFAR-10 lies in `data_dir`, as torchvision's files; where it is missing, it is downloaded there if `download`. `home`
    is the folder mlruns, where test splits are fixed and decoded images cached; `found` is what `listed` returned a moment
    ago, where it was called already. Raises DataError where the data is missing
    or damaged, UserError for an unknown name, too large or too few images.
    """
    return _load(about, about.form, data_dir.absolute(), home, download, found)


def _load(
    about: Data, form: Form, data_dir: Path, home: Path | None, download: bool, found: Listed | None = None
) -> Dataset:
    files = None
    if source := SOURCES.get(about.dataset):
        name, read = about.dataset, source.read(form, data_dir, download)
    else:
        found = found or listed(about, home)
        result = read_files(found.listing, form, about, home)
        copies, read = exact_groups(result.digests), result.labelled
        files = Listed(result.listing, found.seal, result.excluded, result.num_test_copies, copies)
        name = f"{files.listing.short_name}-{read.digest[:SUFFIX_DIGITS]}"
    return Dataset(
        name=name,
        classes=read.classes,
        train=Split(read.images, read.labels),
        digest=read.digest,
        source=read.source,
        is_validation=read.is_validation,
        groups=read.groups,
        listed=files,
        held=Split(read.held.images, read.labels, read.held.aspects) if read.held else None,
        form=form,
        read=partial(_load_same, about, data_dir, home, read.digest, found),
    )


def _copies_line(copies: np.ndarray, labels: np.ndarray, validation: Tensor | None) -> str:
    """How many images are equal to others, in two classes, and on both sides; empty where none are."""
    counts = np.bincount(copies, minlength=len(copies))
    if not (counts > 1).any():
        return ""

    def num_in_two(sides: np.ndarray) -> int:
        """Images whose copies lie on several sides."""
        pairs = np.unique(np.stack([copies, sides], axis=1), axis=0)[:, 0]
        return int(counts[np.bincount(pairs, minlength=len(copies)) > 1].sum())

    parts = [f"{num_in_two(labels)} under two classes"]
    if validation is not None:
        parts.append(
            f"{num_in_two(np.isin(np.arange(len(copies)), validation.numpy()).astype(int))} in training and validation"
        )
    return f"{counts[counts > 1].sum()} images are copies of each other, {' and '.join(parts)}"


def _load_same(
    about: Data, data_dir: Path, home: Path | None, digest: str, found: Listed | None, form: Form
) -> Dataset:
    """`load`, of the files that were `found` then: what was added since waits for the next command.

    DataError where they are not what they were.
    """
    again = _load(about, form, data_dir, home, download=False, found=found)
    if again.digest != digest:
        raise DataError(again.source, "its images changed while they were in use", "start again")
    return again


def existing_place(dataset: str) -> Path:
    """The folder or manifest of this path; DataError, or UserError for what is more like a mistyped name, for neither."""
    place = Path(os.path.abspath(os.path.expanduser(dataset)))
    try:
        if place.is_dir() or (place.is_file() and place.suffix.lower() in MANIFESTS):
            return place
        exists = place.exists()
    except OSError as error:
        raise DataError(str(error.filename), error.strerror or "") from error
    subject = f"data.dataset = {dataset}"
    known = (
        f"{', '.join(SOURCES)}, or the path of a folder of images by class, or of a manifest ({', '.join(MANIFESTS)})"
    )
    if exists:
        raise DataError(subject, "neither a folder nor a manifest", f"give one of {known}")
    if os.sep in dataset or place.suffix.lower() in MANIFESTS:
        raise DataError(subject, "there is nothing", f"give one of {known}")
    raise UserError(subject, f"not one of {known}{did_you_mean(dataset, SOURCES)}")
