"""Image files, folders of them and pickles -> ids and pixels, batch by batch."""

import contextlib
import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.data.images import SUFFIXES, BadImage, image_files, left_out_line, read_images, resized
from pipeline.errors import path_text
from pipeline.inference.pickles import read_pickle
from pipeline.sections.data import Form

OnFault = Callable[[BadImage], None]
Batch = tuple[list[str], Tensor]


def read_inputs(
    paths: Sequence[Path],
    form: Form,
    on_fault: OnFault,
    batch_size: int = 500,
    note: Callable[[str], None] = lambda line: None,
) -> Iterator[Batch]:
    """ids and uint8 images (n, 3, S, S), in the order of the paths; what can't be used is given to on_fault and skipped.

    A path is an image file, a folder (all images below it, in the order of their names) or a pickle as `read_pickle`
    takes it: a file that begins as one, or is called .pkl or .pickle. n is 1 to `batch_size`; one batch and one pickle
    are in memory at a time. `note` is given a line for each folder with files that are left out, as they are of no
    format that is read.

    The id of a file is its path, below a folder beginning with the folder's as given; bytes that aren't UTF-8 become
    escapes. In a pickle it is the pickle's own id or 0 to N - 1, behind `<path>:` where several paths are given.
    Ids are unique: a path given twice, or given beside its folder, is read once, where it comes first.
    """
    assert batch_size > 0, batch_size
    paths = list(dict.fromkeys(paths))
    seen_ids: set[str] = set()
    for pickled, pairs in groupby(_files(paths, on_fault, note), key=itemgetter(0)):
        files = (path for _, path in pairs)
        if pickled:
            for path in files:
                prefix = f"{path_text(path)}:" if len(paths) > 1 else ""
                yield from _of_pickle(path, prefix, form, on_fault, batch_size, seen_ids)
        else:
            yield from _of_images(files, form, on_fault, batch_size, seen_ids)


def _files(paths: Iterable[Path], on_fault: OnFault, note: Callable[[str], None]) -> Iterator[tuple[bool, Path]]:
    """(whether it is a pickle, file), each file once."""
    seen: set[Path] = set()
    for given in paths:
        folder = os.path.isdir(given)
        pickled = not folder and _is_pickle(given)
        for path in _images_below(given, on_fault, note) if folder else [given]:
            if path not in seen:
                yield pickled, path
            seen.add(path)


def _is_pickle(path: Path) -> bool:
    """By its first byte, with which no image format begins; protocols 0 and 1 have none, so by the name too."""
    if path.suffix.lower() in (".pkl", ".pickle"):
        return True
    with contextlib.suppress(OSError):  # an image that can't be read, then
        if path.is_file():  # opening a pipe would wait for ever
            with path.open("rb") as stream:
                return stream.read(1) == pickle.PROTO
    return False


def _images_below(folder: Path, on_fault: OnFault, note: Callable[[str], None]) -> list[Path]:
    left_out = Counter[str]()
    try:
        files = [Path(file) for file in image_files(folder, left_out)]
    except OSError as error:
        on_fault(BadImage(Path(error.filename), f"{error.strerror}: no file of {folder} is read"))
        return []
    if line := left_out_line(folder, left_out):
        note(line)
    if not files:
        on_fault(BadImage(folder, f"holds no images ({' '.join(SUFFIXES)}); a pickle is given by its own path"))
    return files


def _of_images(
    paths: Iterator[Path], form: Form, on_fault: OnFault, batch_size: int, seen_ids: set[str]
) -> Iterator[Batch]:
    while chunk := list(islice(paths, batch_size)):
        ids, images = [], []
        for path, result in zip(chunk, read_images(chunk, form), strict=True):
            name = path_text(path)
            if isinstance(result, BadImage):
                on_fault(result)
            elif name in seen_ids:
                on_fault(_same_id(path))
            else:
                seen_ids.add(name)
                ids.append(name)
                images.append(result.image)
        if ids:
            yield ids, torch.from_numpy(np.stack(images))


def _of_pickle(
    path: Path, prefix: str, form: Form, on_fault: OnFault, batch_size: int, seen_ids: set[str]
) -> Iterator[Batch]:
    try:
        images, own_ids = read_pickle(path)
    except BadImage as error:
        on_fault(BadImage(error.path, error.reason))  # the caught one's traceback holds the file's content
        return
    ids = [prefix + name for name in own_ids or map(str, range(len(images)))]
    if not seen_ids.isdisjoint(ids):
        on_fault(_same_id(path))
        return
    seen_ids.update(ids)
    for start in range(0, len(ids), batch_size):
        part = slice(start, start + batch_size)
        yield ids[part], resized(torch.tensor(images[part]), form)


def _same_id(path: Path) -> BadImage:
    return BadImage(path, "would have the id of another input: rename it")
