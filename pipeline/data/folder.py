"""A folder of images in torchvision's ImageFolder layout: train/<class>/**, and test/<class>/** for promotion."""

import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.data.images import (
    SUFFIXES,
    BadImage,
    HeldImages,
    LabelledImages,
    check_memory,
    image_files,
    read_images,
    shown_size,
)
from pipeline.errors import DataError, Problem, did_you_mean
from pipeline.recipe import Form

MAX_LISTED = 20  # problems that an error lists
PROGRESS_S = 10.0  # between two lines of progress
MAX_LOOKED_AT = 200  # images whose sizes a default goes by

log = logging.getLogger(__name__)


def read(root: Path, form: Form) -> LabelledImages:
    """The images of train/<class>/** in the folder `root`, classes and files in the order of their names.

    DataError where the layout is another, a file can't be read or a class has less than two images.
    """
    try:
        files = _files_by_class(root)
    except OSError as error:
        raise DataError(str(error.filename), error.strerror or "") from error
    paths = [path for class_paths in files.values() for path in class_paths]
    check_memory(len(paths), form)
    labels = np.repeat(np.arange(len(files)), [len(class_paths) for class_paths in files.values()])
    images, held, content = decoded(paths, form)
    digest = hashlib.sha256(json.dumps([list(files), labels.tolist()]).encode() + content).hexdigest()
    return LabelledImages(images, torch.from_numpy(labels), tuple(files), str(root), digest, held)


@dataclass(frozen=True)
class Sizes:
    """Of the images of a folder, as far as they were looked at; medians, in pixels as they are shown."""

    num_images: int
    width: int
    height: int
    elongation: float  # long side by short side


def look(root: Path) -> Sizes | None:
    """The sizes of some of the training images, without decoding them; None where none can be read."""
    paths = [path for class_paths in _files_by_class(root).values() for path in class_paths]
    sizes = list(filter(None, map(shown_size, paths[:: math.ceil(len(paths) / MAX_LOOKED_AT)])))
    if not sizes:
        return None
    widths, heights = np.array(sizes).T
    elongation = np.median(np.maximum(widths, heights) / np.minimum(widths, heights))
    return Sizes(len(sizes), int(np.median(widths)), int(np.median(heights)), float(elongation))


def short_name(root: Path) -> str:
    """The folder's name, made of a-z, 0-9, _ and - only, at most 40 characters."""
    return re.sub(r"[^a-z0-9_-]+", "-", root.name.lower()).strip("-")[:40] or "folder"


def _files_by_class(root: Path) -> dict[str, list[Path]]:
    train = root / "train"
    if not train.is_dir():
        raise DataError(str(root), "has no folder train", f"put the images into {train}/<class>/")
    files = {name: image_files(train / name) for name in class_names(train)}
    check_inside(root, [path for paths in files.values() for path in paths])
    if len(files) < 2:
        raise DataError(
            str(train), f"holds {len(files)} class folder(s), needs at least 2", "add a folder for each class"
        )
    problems = [
        Problem(
            str(train / name),
            f"holds {len(paths)} image(s), needs at least 2",
            f"add some ({' '.join(SUFFIXES)}) or remove it",
        )
        for name, paths in files.items()
        if len(paths) < 2
    ]
    test = root / "test"  # only its names are read: its images stay sealed
    problems += [
        Problem(str(test / name), f"no such class in {train}{did_you_mean(name, files)}", "rename or remove it")
        for name in (class_names(test) if test.is_dir() else [])
        if name not in files
    ]
    if problems:
        raise DataError.many(_first(problems))
    return files


def check_inside(root: Path, paths: Sequence[Path]) -> None:
    """DataError, a problem for each of the images that links lead out of the data set to: figures in reports show them."""
    real, folders = os.path.realpath(root), {parent: os.path.realpath(parent) for parent in {p.parent for p in paths}}
    targets = {path: os.path.realpath(path) if path.is_symlink() else folders[path.parent] for path in paths}
    outside = [path for path, target in targets.items() if os.path.commonpath([real, target]) != real]
    if outside:
        remedy = "copy the images into it, or give the folder where they lie"
        raise DataError.many(_first([Problem(str(path), f"a link leads out of {root}", remedy) for path in outside]))


def class_names(split: Path) -> list[str]:
    """The class folders of `train` or `test`, sorted; DataError for names that no database takes."""
    names = sorted(path.name for path in split.iterdir() if path.is_dir() and not path.name.startswith("."))
    # Bytes that aren't UTF-8 become surrogates in Python, which no file or database takes.
    refused = [name for name in names if any(c < " " or "\ud800" <= c <= "\udfff" for c in name)]
    if refused:
        remedy = "rename it, without control characters, in UTF-8"
        raise DataError.many([Problem(f"{split}: class folder {name!a}", remedy=remedy) for name in refused])
    return names


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
        raise DataError.many([*_first(problems), summary])
    to_crop = HeldImages(torch.from_numpy(held), aspects) if form.held else None
    return torch.from_numpy(images), to_crop, content.digest()


def _first(problems: list[Problem]) -> list[Problem]:
    more = len(problems) - MAX_LISTED
    return [*problems[:MAX_LISTED], Problem(f"and {more} more")] if more > 0 else problems
