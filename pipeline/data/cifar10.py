"""CIFAR-10, as torchvision's files: checked by their MD5 and downloaded where they are missing."""

import contextlib
import http.client
import io
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline.data.images import LabelledImages, check_memory, of_pixels
from pipeline.errors import DataError, Problem, lines_of, proxies
from pipeline.sections.data import Form

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10  # type: ignore[import-untyped]

NATURAL_SIZE = 32  # pixels
TRAIN_IMAGES = 50_000
DOWNLOAD_TIMEOUT_S = 30.0  # without a byte

log = logging.getLogger(__name__)


def read(form: Form, data_dir: Path, download: bool) -> LabelledImages:
    """The 50,000 training images, from `data_dir`, an absolute path; downloaded there where they are missing.

    DataError where the files are missing and may not or can't be downloaded, or where they are damaged.
    """
    check_memory(TRAIN_IMAGES, form)
    from torchvision.datasets import CIFAR10

    folder = data_dir / CIFAR10.base_folder
    try:
        exists = folder.exists() and any(folder.iterdir())
        if not (exists or download):
            raise DataError(f"cifar10: not in {folder}", remedy="`--data-dir` names its folder")
        data = _read_files(folder) if exists else _download(folder)
    except OSError as error:
        raise DataError(f"cifar10: {error.filename or folder}", error.strerror or str(error)) from error
    pixels, labels = torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets)
    return of_pixels(pixels, labels, tuple(data.classes), str(folder), form, NATURAL_SIZE)


def _read_files(folder: Path) -> "CIFAR10":
    """torchvision checks each file's MD5 before it unpickles any."""
    from torchvision.datasets import CIFAR10

    try:
        return CIFAR10(folder.parent, train=True)
    except RuntimeError:
        problems = file_problems(folder)
        if not problems:
            raise
        remedy = f"put the right files there, or remove {folder} to have them downloaded"
        raise DataError("cifar10", "files are missing or damaged", remedy, lines_of(problems)) from None


def file_problems(folder: Path) -> list[Problem]:
    """One for each of CIFAR-10's files that is missing from torchvision's folder, or damaged."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_md5  # type: ignore[import-untyped]

    meta = (CIFAR10.meta["filename"], CIFAR10.meta["md5"])
    return [
        Problem(f"cifar10: {folder / name}", "damaged (wrong MD5)" if (folder / name).is_file() else "missing")
        for name, md5 in (*CIFAR10.train_list, *CIFAR10.test_list, meta)
        if not (folder / name).is_file() or not check_md5(folder / name, md5)
    ]


def _download(folder: Path) -> "CIFAR10":
    """Into a temporary folder next to `folder`, checked there and moved by one rename, so that `folder` is complete."""
    from torchvision.datasets import CIFAR10

    log.info("downloading CIFAR-10 (170 MB) from %s to %s", CIFAR10.url, folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".cifar10-", dir=folder.parent) as new:
            with _socket_timeout(DOWNLOAD_TIMEOUT_S), _silence():
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
            "cifar10",
            f"not in {folder}, and its download failed",
            "put the files there, or `--dataset digits`, which needs no download",
            [
                f"{CIFAR10.url} failed{through}: {error or type(error).__name__}",
                f"files: {', '.join([*files, CIFAR10.meta['filename']])}",
            ],
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
