"""A folder of images by class -> a listing: train/<class>/**, val/<class>/** and test/<class>/**, or <class>/** alone."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pipeline.data.images import HIDDEN, SUFFIXES, image_files, is_litter
from pipeline.data.listing import ORDER, SPLITS, TRAIN, Listing, check_classes, check_inside, check_names
from pipeline.errors import DataError, Problem, counted

_SPLIT = re.compile(rf"(?<![a-z])({'|'.join(SPLITS)})(?![a-z])")  # as a word of a name in lower case: seg_train
# Kinds of what is left out.
NO_CLASS, BESIDE = "in no class folder", "folders beside the splits"
MAX_NAMED = 5  # folders that an error names


def read_folder(root: Path) -> Listing:
    """All images, classes and files in the order of their names. Of test images only the names are read.

    DataError where the layout is another or a class has less than two images; OSError where a folder can't be read.
    """
    left_out: Counter[str] = Counter()
    folders = _split_folders(root, left_out)
    files = {
        split: {name: image_files(folder / name, left_out) for name in _class_names(folder, left_out)}
        for split, folder in folders.items()
    }
    rows = [(file, name, split) for split in files for name, found in files[split].items() for file in found]
    check_inside(root, [file for file, _, _ in rows])
    check_classes(
        {split: {name: len(found) for name, found in classes.items()} for split, classes in files.items()},
        lambda split, name: str(folders[split] / name),
        "add a folder for each class"
        + (", or rename it if it is one" if left_out[BESIDE] else "")
        + (f", and move the {counted(left_out[NO_CLASS], 'file')} that lie in none" if left_out[NO_CLASS] else ""),
    )
    classes = tuple(files[TRAIN])
    number = {name: index for index, name in enumerate(classes)}
    return Listing(
        place=root,
        classes=classes,
        names=[file.removeprefix(f"{root}{os.sep}") for file, _, _ in rows],
        labels=np.array([number[name] for _, name, _ in rows], dtype=np.int64),
        splits=np.array([split for _, _, split in rows]),
        left_out=left_out,
    )


def _split_folders(root: Path, left_out: Counter[str]) -> dict[str, Path]:
    """Split -> its folder, training first; the root itself where it has no folder of a split's name."""
    folders: dict[str, list[Path]] = {split: [] for split in ORDER}
    others: list[Path] = []
    for path in sorted(root.iterdir()):
        if path.is_dir() and not is_litter(path.name):
            folders.get(SPLITS.get(path.name.lower(), ""), others).append(path)
    if problems := [
        Problem(str(root), f"has {' and '.join(path.name for path in found)}, which mean the same", "keep one of them")
        for found in folders.values()
        if len(found) > 1
    ]:
        raise DataError.many(problems)
    found = {split: paths[0] for split, paths in folders.items() if paths}
    if found and TRAIN not in found:
        raise DataError(str(root), "has no folder train", f"put the training images into {root}/train/<class>/")
    if not found:
        _check_are_classes(root, others)
    left_out[BESIDE] += len(others) if found else 0
    return found or {TRAIN: root}


def _check_are_classes(root: Path, folders: Sequence[Path]) -> None:
    """DataError where the folders, none of which has a split's name, look like splits: by their names, or what is in them."""
    splits: dict[str, set[str]] = {}  # name without the split's -> splits: seg_train and seg_test
    for name in (path.name.lower() for path in folders):
        if word := _SPLIT.search(name):
            splits.setdefault(_SPLIT.sub("", name), set()).add(SPLITS[word[1]])
    inside = [set(_subfolders(path)) for path in folders]
    shared = inside[0].intersection(*inside) if len(inside) > 1 else set[str]()
    if any(len(named) > 1 for named in splits.values()) or len(shared) > max(1, len(set[str]().union(*inside)) / 2):
        names = ", ".join(path.name for path in folders[:MAX_NAMED]) + (", ..." if len(folders) > MAX_NAMED else "")
        raise DataError(
            str(root),
            f"its folders look like splits, not classes: {names}",
            "rename them to train and test, with a folder for each class in them; or, if they are classes, move them "
            f"into {root}/train",
        )


def _subfolders(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:  # knows folders without a look at each file
        yield from (entry.name for entry in entries if entry.is_dir() and not is_litter(entry.name))


def _class_names(folder: Path, left_out: Counter[str]) -> list[str]:
    """The class folders of a split, sorted; what lies beside them is counted."""
    names = []
    for path in folder.iterdir():
        if is_litter(path.name):
            left_out[HIDDEN] += 1
        elif path.is_dir():
            names.append(path.name)
        else:
            left_out[NO_CLASS if path.name.lower().endswith(SUFFIXES) else path.suffix.lower() or "without suffix"] += 1
    check_names(folder, names)
    return sorted(names)
