"""The data sets: CIFAR-10, scikit-learn's digits, or a folder of images -> pixels and labels in memory, with a digest.

Only images that may train and validate are read here; the test split stays closed (see `splits.py`).
"""

import contextlib
import hashlib
import http.client
import io
import json
import logging
import os
import re
import socket
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.data.images import SUFFIXES, BadImage, image_files, read_images, resized
from pipeline.data.splits import sealed
from pipeline.errors import DataError, UserError, did_you_mean, proxies

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10  # type: ignore[import-untyped]

NATURAL_SIZE = {"cifar10": 32, "digits": 16}  # pixels; digits are 8 x 8, which leaves little to pool
CIFAR10_TRAIN_IMAGES = 50_000
DOWNLOAD_TIMEOUT = 30.0  # seconds without a byte
MAX_BYTES = 16 * 2**30
MAX_LISTED = 20
DIGITS_TEST_FRACTION, DIGITS_TEST_SEED = 0.2, 20_261_101  # never change them: they seal the test split

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Split:
    """`images` uint8 (N, 3, S, S), RGB; `labels` int64 (N,), indices into the data set's classes."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory. `train` holds all that may train or validate, never a test image.

    `name` is short and made of a-z, 0-9, _ and -; `digest` is the SHA-256 of shapes, pixels, labels and class names;
    `source` says where the images were read from.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    digest: str
    source: str


def default_image_size(dataset: str) -> int | None:
    """The size in pixels that suits a data set; None for a folder, whose images may have any."""
    return NATURAL_SIZE.get(dataset)


def load(dataset: str, image_size: int, data_dir: Path, download: bool = True) -> Dataset:
    """Read `cifar10`, `digits` or the folder of that path, its images resized to image_size x image_size.

    CIFAR-10 lies in `data_dir`, as torchvision's files, and with `download` is downloaded there where it does not.
    Raises DataError where the data is missing or damaged, UserError for an unknown name or too large images.
    """
    assert image_size > 0, image_size
    if dataset == "cifar10":
        return _cifar10(image_size, data_dir.absolute(), download)
    if dataset == "digits":
        return _digits(image_size)
    return _folder(dataset, image_size)


def _dataset(name: str, classes: Sequence[str], images: Tensor, labels: Tensor, source: str) -> Dataset:
    header = json.dumps([list(classes), list(images.shape), list(labels.shape)])
    digest = hashlib.sha256(header.encode())
    digest.update(images.numpy().data)
    digest.update(labels.numpy().astype("<i8").data)
    return Dataset(name, tuple(classes), Split(images, labels), digest.hexdigest(), source)


def _check_memory(images: int, image_size: int) -> None:
    size = images * 3 * image_size**2
    if size > MAX_BYTES:
        raise UserError(
            f"data.image_size = {image_size}: {images:,} images take {size / 2**30:.1f} GiB of memory, more than "
            f"{MAX_BYTES / 2**30:g}: lower it, or use fewer images"
        )


# ---------------------------------------------------------------------------------------------------------- CIFAR-10


def _cifar10(image_size: int, data_dir: Path, download: bool) -> Dataset:
    _check_memory(CIFAR10_TRAIN_IMAGES, image_size)
    from torchvision.datasets import CIFAR10

    folder = data_dir / CIFAR10.base_folder
    try:
        there = folder.exists() and any(folder.iterdir())
        if not (there or download):
            raise DataError(f"cifar10: not in {folder}; DATA_DIR= says where it lies")
        data = _read_cifar10(folder) if there else _download_cifar10(folder)
    except OSError as error:
        raise DataError(f"cifar10: {error.filename or folder}: {error.strerror or error}") from error
    images = resized(torch.from_numpy(data.data).permute(0, 3, 1, 2), image_size)
    return _dataset("cifar10", data.classes, images, torch.tensor(data.targets), str(folder))


def _read_cifar10(folder: Path) -> "CIFAR10":
    """torchvision checks each file's MD5 before it unpickles any."""
    from torchvision.datasets import CIFAR10

    try:
        return CIFAR10(folder.parent, train=True)
    except RuntimeError:
        faults = cifar10_faults(folder)
        if not faults:
            raise
        way_out = f"Put the right files there, or remove {folder} to have them downloaded."
        raise DataError([*faults, way_out]) from None


def cifar10_faults(folder: Path) -> list[str]:
    """A line for each of CIFAR-10's files that is missing from torchvision's folder, or damaged."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_md5  # type: ignore[import-untyped]

    meta = (CIFAR10.meta["filename"], CIFAR10.meta["md5"])
    return [
        f"cifar10: {folder / name}: {'damaged (wrong MD5)' if (folder / name).is_file() else 'missing'}"
        for name, md5 in (*CIFAR10.train_list, *CIFAR10.test_list, meta)
        if not (folder / name).is_file() or not check_md5(folder / name, md5)
    ]


def _download_cifar10(folder: Path) -> "CIFAR10":
    """Into a temporary folder beside the goal, checked there, and moved by one rename: never half of it."""
    from torchvision.datasets import CIFAR10

    log.info("downloading CIFAR-10 (170 MB) from %s to %s", CIFAR10.url, folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".cifar10-", dir=folder.parent) as new:
            with _socket_timeout(DOWNLOAD_TIMEOUT), _silence():
                data = CIFAR10(new, train=True, download=True)
            try:
                os.rename(Path(new) / CIFAR10.base_folder, folder)
            except OSError:  # another process was faster
                if not folder.is_dir():
                    raise
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        through = f" (through {proxies()})" if proxies() else ""
        files = [name for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list)]
        raise DataError(
            [
                f"cifar10: not in {folder}",
                f"cifar10: download from {CIFAR10.url} failed{through}: {error or type(error).__name__}",
                f"Either put the files there: {folder}/{{{','.join([*files, CIFAR10.meta['filename']])}}}",
                "or take the data set that needs no download: DATASET=digits, on the command line --dataset digits",
            ]
        ) from error
    log.info("downloaded CIFAR-10")
    return data


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """torchvision takes no timeout, so it is set for all sockets that are opened meanwhile."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# ------------------------------------------------------------------------------------------------------------ digits


def _digits(image_size: int) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels of 0 to 16; a fifth is the sealed test split."""
    import sklearn
    from sklearn.datasets import load_digits

    _check_memory(1797, image_size)
    digits = load_digits()
    labels = torch.from_numpy(digits.target.astype(np.int64))
    usable, _ = sealed(labels, DIGITS_TEST_FRACTION, DIGITS_TEST_SEED)
    grey = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[usable]
    images = resized(grey[:, None].expand(-1, 3, -1, -1), image_size)
    source = f"scikit-learn {sklearn.__version__}"
    return _dataset("digits", [str(digit) for digit in range(10)], images, labels[usable], source)


# ------------------------------------------------------------------------------------------------------------ folder


def _folder(dataset: str, image_size: int) -> Dataset:
    """torchvision's ImageFolder layout: train/<class>/**, classes and files in the order of their names."""
    try:
        root = existing_folder(dataset)
        files = _files_by_class(root)
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from error
    paths = [path for class_paths in files.values() for path in class_paths]
    _check_memory(len(paths), image_size)
    labels = np.repeat(np.arange(len(files)), [len(class_paths) for class_paths in files.values()])
    name = re.sub(r"[^a-z0-9_-]+", "-", root.name.lower()).strip("-")[:40] or "folder"
    return _dataset(name, list(files), decoded(paths, image_size), torch.from_numpy(labels), str(root))


def existing_folder(dataset: str) -> Path:
    """The folder of this path; DataError, or UserError for what is more like a mistyped name, where there is none."""
    root = Path(os.path.abspath(os.path.expanduser(dataset)))
    if root.is_dir():
        return root
    known = f"{', '.join(NATURAL_SIZE)}, or the path of a folder with train/<class>/*"
    if root.exists():
        raise DataError(f"data.dataset = {dataset}: not a folder: give one of {known}")
    if os.sep in dataset:
        raise DataError(f"data.dataset = {dataset}: no such folder: give one of {known}")
    raise UserError(f"data.dataset = {dataset}: not one of {known}{did_you_mean(dataset, NATURAL_SIZE)}")


def _files_by_class(root: Path) -> dict[str, list[Path]]:
    train = root / "train"
    if not train.is_dir():
        raise DataError(f"{root}: has no folder train: put the images into {train}/<class>/")
    files = {name: image_files(train / name) for name in class_names(train)}
    check_inside(root, [path for paths in files.values() for path in paths])
    if len(files) < 2:
        raise DataError(f"{train}: holds {len(files)} class folder(s), needs at least 2: one for each class")
    lines = [
        f"{train / name}: holds {len(paths)} image(s), needs at least 2: add some ({' '.join(SUFFIXES)}) or remove it"
        for name, paths in files.items()
        if len(paths) < 2
    ]
    test = root / "test"  # only its names are looked at: its images stay sealed
    lines += [
        f"{test / name}: no such class in {train}{did_you_mean(name, files)}: rename or remove it"
        for name in (class_names(test) if test.is_dir() else [])
        if name not in files
    ]
    if lines:
        raise DataError(_first(lines))
    return files


def check_inside(root: Path, paths: Sequence[Path]) -> None:
    """DataError, a line for each of the images that links lead out of the data set to: pictures in reports show them."""
    real, folders = os.path.realpath(root), {parent: os.path.realpath(parent) for parent in {p.parent for p in paths}}
    targets = {path: os.path.realpath(path) if path.is_symlink() else folders[path.parent] for path in paths}
    out = [path for path, target in targets.items() if os.path.commonpath([real, target]) != real]
    if out:
        way_out = "copy the images into it, or give the folder where they lie"
        raise DataError(_first([f"{path}: a link leads out of {root}: {way_out}" for path in out]))


def class_names(split: Path) -> list[str]:
    """The class folders of `train` or `test`, sorted; DataError for names that no database takes."""
    names = sorted(path.name for path in split.iterdir() if path.is_dir() and not path.name.startswith("."))
    odd = [name for name in names if any(c < " " or "\ud800" <= c <= "\udfff" for c in name)]
    if odd:  # bytes that aren't UTF-8 reach us as surrogates, which no file or database takes
        raise DataError(
            [f"{split}: class folder {name!a}: rename it, without control characters, in UTF-8" for name in odd]
        )
    return names


def decoded(paths: Sequence[Path], size: int) -> Tensor:
    """uint8 (N, 3, size, size); one DataError for all the files that can't be read."""
    log.info("reading %d images", len(paths))
    images = np.empty((len(paths), 3, size, size), dtype=np.uint8)
    bad = []
    for index, result in enumerate(read_images(paths, size)):
        if isinstance(result, BadImage):
            bad += result.lines
        else:
            images[index] = result
    if bad:
        raise DataError([*_first(bad), f"{len(bad)} of {len(paths)} images can't be used: replace or remove them"])
    return torch.from_numpy(images)


def _first(lines: list[str]) -> list[str]:
    more = len(lines) - MAX_LISTED
    return [*lines[:MAX_LISTED], f"and {more} more"] if more > 0 else lines
