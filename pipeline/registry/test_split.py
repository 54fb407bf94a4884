"""The only opener of the test split. Each model is evaluated on it once, and the ledger has the test evaluation first.

A split has a name before it is opened: the SHA-256 of the files that it is made of, or of what seals it. It doesn't depend
on the size of the images, so that models that see the same images at different sizes are compared on one split.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.data import cifar10, digits
from pipeline.data.cache import in_batches
from pipeline.data.datasets import Split, default_image_size, listed
from pipeline.data.exclusions import MISSING
from pipeline.data.images import resized
from pipeline.data.listing import TEST, Listing
from pipeline.data.splits import sealed
from pipeline.data.survey import Survey, survey_files, survey_pixels
from pipeline.disk import sha256_of
from pipeline.errors import DataError, lines_of
from pipeline.evaluation.logits import images_together
from pipeline.sections.data import Data, Form

BATCHES = 8  # of a prediction, that are read together
_REPLACE = "replace or remove them; the run stays promotable, as none of them trained it"


def digest_of(about: Data, data_dir: Path, home: Path | None = None) -> str:
    """The split's name, 64 hexadecimal digits; no image is decoded.

    The arguments are those of `datasets.load`. DataError where there is no test split, or it is damaged; a file that can't
    be read where those are skipped has a mark in the name, as it isn't evaluated on.
    """
    if about.dataset == "cifar10":
        return _cifar10_digest(data_dir.absolute())
    if about.dataset == "digits":
        from sklearn.datasets import load_digits

        seal = json.dumps([digits.TEST_FRACTION, digits.TEST_SEED]).encode()
        return hashlib.sha256(load_digits().data.tobytes() + seal).hexdigest()
    test, digest = _test_images(about, home), hashlib.sha256()
    for path, name, label in zip(map(Path, test.files), test.names, test.labels, strict=True):
        in_class = f"{test.classes[label]}: {name}" if test.is_manifest else name
        try:
            size, content = path.stat().st_size, bytes.fromhex(sha256_of(path))
        except OSError as error:
            if about.corrupt != "skip":
                raise DataError(str(error.filename), error.strerror or str(error)) from None
            size, content = MISSING, b""
        digest.update(json.dumps([in_class, size]).encode() + content)
    return digest.hexdigest()


def num_shared(about: Data, home: Path | None, files: Sequence[str]) -> tuple[int, int]:
    """How many images of a folder's or manifest's test split equal one of `files` byte for byte, and how many it has."""
    test = _test_images(about, home).files
    sizes = {size for path in test if (size := _size_of(path))}
    others = {sha256_of(Path(path)) for path in files if _size_of(path) in sizes}
    return sum(bool(_size_of(path)) and sha256_of(Path(path)) in others for path in test), len(test)


def _size_of(path: str) -> int:
    """In bytes; 0 of a file that can't be read."""
    return os.path.getsize(path) if os.access(path, os.R_OK) else 0


def open_test_split(about: Data, form: Form, data_dir: Path, classes: Sequence[str], home: Path | None = None) -> Split:
    """All of `read_test_split` at once."""
    parts = list(read_test_split(about, form, data_dir, classes, home))
    images = [part.images for part in parts if isinstance(part.images, Tensor)]
    return Split(torch.cat(images), torch.cat([part.labels for part in parts]))


def read_test_split(
    about: Data, form: Form, data_dir: Path, classes: Sequence[str], home: Path | None = None
) -> Iterator[Split]:
    """The images in the form that a model sees, on the CPU, and labels that are indices into its `classes`.

    Those of files come a batch at a time, so that they need not fit in memory. Record the test evaluation in the ledger
    first. DataError as from `digest_of`, and where there are classes that aren't the model's.
    """
    for names, images, labels in _opened(about, form, data_dir.absolute(), home):
        if unknown := sorted({names[i] for i in labels.tolist()} - set(classes)):
            rule = f"the test split has classes that the model doesn't know: {', '.join(unknown)}"
            raise DataError(about.dataset, rule)
        place = torch.tensor([classes.index(name) if name in classes else -1 for name in names])
        yield Split(images, place[labels])


def survey_test_split(about: Data, data_dir: Path, home: Path) -> Survey:
    """What is compared with the other images before anything is trained: fingerprints, sizes, counts; it may be empty.

    No model sees the images, and none is shown. Labels are indices into the data set's classes. DataError where files are
    missing or damaged.
    """
    if size := default_image_size(about.dataset):
        [(_, images, labels)] = _opened(about, Form(size), data_dir.absolute(), home)
        return survey_pixels(images, labels, TEST)
    return survey_files(listed(about, home).listing.sealed_part)


def _opened(
    about: Data, form: Form, data_dir: Path, home: Path | None
) -> Iterator[tuple[Sequence[str], Tensor, Tensor]]:
    """Class names, images, and labels that are indices into them; of a data set with a name all at once."""
    if about.dataset == "cifar10":
        from torchvision.datasets import CIFAR10  # type: ignore[import-untyped]

        _check_cifar10(data_dir)
        data = CIFAR10(data_dir, train=False)
        yield data.classes, resized(torch.from_numpy(data.data).permute(0, 3, 1, 2), form), torch.tensor(data.targets)
    elif about.dataset == "digits":
        from sklearn.datasets import load_digits

        loaded = load_digits()
        labels = torch.from_numpy(loaded.target.astype(np.int64))
        _, chosen = sealed(labels, digits.TEST_FRACTION, digits.TEST_SEED)
        grey = torch.from_numpy(np.rint(loaded.images * (255 / 16)).astype(np.uint8))[chosen]
        names = [str(digit) for digit in range(10)]
        yield names, resized(grey[:, None].expand(-1, 3, -1, -1), form), labels[chosen]
    else:
        test, count = _test_images(about, home), BATCHES * images_together(form.size)
        for rows, images in in_batches(test, form, count, about.corrupt == "skip", _REPLACE):
            yield test.classes, images, torch.from_numpy(test.labels[rows])


def _cifar10_digest(data_dir: Path) -> str:
    from torchvision.datasets import CIFAR10

    _check_cifar10(data_dir)
    ((name, _),) = CIFAR10.test_list
    return sha256_of(data_dir / CIFAR10.base_folder / name)


def _check_cifar10(data_dir: Path) -> None:
    """Every file's MD5 is torchvision's, or a DataError."""
    from torchvision.datasets import CIFAR10

    if problems := cifar10.file_problems(data_dir / CIFAR10.base_folder):
        remedy = "`--data-dir` says where the files lie; `study NAME` downloads what is missing"
        raise DataError("CIFAR-10", "its files are missing or damaged", remedy, lines_of(problems))


def _test_images(about: Data, home: Path | None) -> Listing:
    """The test split of a folder or manifest, in the order of classes and paths."""
    test = listed(about, home).listing.sealed_part
    if not test.names:
        rule = "has no test split: promotion needs images that no trial has seen"
        remedy = "run the study again without `--test-fraction 0`, or with images in test/<class>/"
        raise DataError(str(test.place), rule, remedy)
    return test
