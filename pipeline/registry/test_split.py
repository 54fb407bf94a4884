"""The only opener of the test split. Each model is evaluated on it once, and the ledger has the test evaluation first.

A split has a name before it is opened: the SHA-256 of the files that it is made of, or of what seals it. It doesn't depend
on the size of the images, so that models that see the same images at different sizes are compared on one split.
"""

import hashlib
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.data import cifar10, datasets, digits, folder
from pipeline.data.datasets import Split
from pipeline.data.images import SUFFIXES, image_files, resized
from pipeline.data.splits import sealed
from pipeline.errors import DataError, lines_of
from pipeline.recipe import Form


def digest_of(dataset: str, data_dir: Path) -> str:
    """The split's name, 64 hexadecimal digits; no image is decoded and no label is read.

    `dataset` and `data_dir` are those of `datasets.load`. DataError where there is no test split, or it is damaged.
    """
    if dataset == "cifar10":
        return _cifar10_digest(data_dir.absolute())
    if dataset == "digits":
        from sklearn.datasets import load_digits

        seal = json.dumps([digits.TEST_FRACTION, digits.TEST_SEED]).encode()
        return hashlib.sha256(load_digits().data.tobytes() + seal).hexdigest()
    root = datasets.existing_folder(dataset)
    digest = hashlib.sha256()
    try:
        for path in chain(*_test_files(root).values()):
            with path.open("rb") as file:
                digest.update(json.dumps([str(path.relative_to(root)), path.stat().st_size]).encode())
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise DataError(str(error.filename), error.strerror or str(error)) from None
    return digest.hexdigest()


def open_test_split(dataset: str, form: Form, data_dir: Path, classes: Sequence[str]) -> Split:
    """The images in the form that a model sees, on the CPU, and labels that are indices into its `classes`.

    Record the test evaluation in the ledger first. DataError as from `digest_of`, and where there are classes that
    aren't the model's.
    """
    names, images, labels = _opened(dataset, form, data_dir.absolute())
    if unknown := sorted({names[i] for i in labels.tolist()} - set(classes)):
        raise DataError(dataset, f"the test split has classes that the model doesn't know: {', '.join(unknown)}")
    place = torch.tensor([classes.index(name) if name in classes else -1 for name in names])
    return Split(images, place[labels])


def _opened(dataset: str, form: Form, data_dir: Path) -> tuple[Sequence[str], Tensor, Tensor]:
    """Class names, images, and labels that are indices into them."""
    if dataset == "cifar10":
        from torchvision.datasets import CIFAR10  # type: ignore[import-untyped]

        _check_cifar10(data_dir)
        data = CIFAR10(data_dir, train=False)
        return data.classes, resized(torch.from_numpy(data.data).permute(0, 3, 1, 2), form), torch.tensor(data.targets)
    if dataset == "digits":
        from sklearn.datasets import load_digits

        loaded = load_digits()
        labels = torch.from_numpy(loaded.target.astype(np.int64))
        _, chosen = sealed(labels, digits.TEST_FRACTION, digits.TEST_SEED)
        grey = torch.from_numpy(np.rint(loaded.images * (255 / 16)).astype(np.uint8))[chosen]
        names = [str(digit) for digit in range(10)]
        return names, resized(grey[:, None].expand(-1, 3, -1, -1), form), labels[chosen]
    files = _test_files(datasets.existing_folder(dataset))
    place = np.repeat(np.arange(len(files)), [len(paths) for paths in files.values()])
    return list(files), folder.decoded(list(chain(*files.values())), form)[0], torch.from_numpy(place)


def _cifar10_digest(data_dir: Path) -> str:
    from torchvision.datasets import CIFAR10

    _check_cifar10(data_dir)
    ((name, _),) = CIFAR10.test_list
    with (data_dir / CIFAR10.base_folder / name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_cifar10(data_dir: Path) -> None:
    """Every file's MD5 is torchvision's, or a DataError."""
    from torchvision.datasets import CIFAR10

    if problems := cifar10.file_problems(data_dir / CIFAR10.base_folder):
        remedy = "`--data-dir` says where the files lie; `study NAME` downloads what is missing"
        raise DataError("CIFAR-10", "its files are missing or damaged", remedy, lines_of(problems))


def _test_files(root: Path) -> dict[str, list[Path]]:
    """The images of test/<class>/**, classes and files in the order of their names."""
    test = root / "test"
    if not test.is_dir():
        raise DataError(
            str(root),
            "has no folder test: promotion needs images that no trial has seen",
            f"move a fifth of those of each class from {root / 'train'}/<class>/ to {test}/<class>/ and run the study "
            "again",
        )
    files = {name: image_files(test / name) for name in folder.class_names(test)}
    folder.check_inside(test.parent, [path for paths in files.values() for path in paths])
    if not any(files.values()):
        raise DataError(str(test), "holds no images", f"put some into {test}/<class>/ ({' '.join(SUFFIXES)})")
    return files
