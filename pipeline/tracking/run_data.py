"""The data set that a run saw, opened again: by its digest, wherever it lies now."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.datasets import SOURCES, Dataset, load
from pipeline.errors import DataError, UserError

MOST_PLACES = 10  # of a study are kept


@dataclass(frozen=True)
class Seen:
    """What a run saw, and where that may lie."""

    what: str  # whose it is, for messages
    dataset: str  # as `load` takes it, by the run's recipe
    image_size: int  # pixels
    digest: str
    places: Sequence[str]  # the newest first, as `MlflowTracker.places_of` has them


@dataclass(frozen=True, eq=False)
class Found:
    """A run's data set, and what `load` and the test split's opener take to find it there again."""

    images: Dataset
    dataset: str
    data_dir: Path


def find_data(seen: Seen, data_dir: Path, dataset: str | None = None, download: bool = True) -> Found:
    """The data set of the run, from the first place whose images have its digest.

    Only `dataset`, a name or a folder as `load` takes it, where it is given; else the places that are known and the one
    that the recipe names; of CIFAR-10 `data_dir` comes first, and where nothing fits it is downloaded there. DataError with
    a line for each place that was tried.
    """
    tried: dict[str, list[str]] = {}
    for name, directory, may_download in _candidates(seen, data_dir, dataset, download):
        place = str(directory.absolute()) if name in SOURCES else _resolved(name)
        if not dataset and name not in SOURCES and not os.path.lexists(name):
            tried[place] = [f"{name}: no such folder"]
            continue
        try:
            images = load(name, seen.image_size, directory, may_download)
        except UserError as error:
            tried[place] = error.lines
            continue
        if images.digest == seen.digest:
            return Found(images, name, directory)
        tried[place] = [f"{images.source}: holds other images, digest {images.digest[:12]}"]
    way_out = "DATA_DIR= says where" if seen.dataset in SOURCES else "DATASET= names the folder where it lies now"
    line = f"{seen.what}: its data set, digest {seen.digest[:12]}, is not in {' or '.join(tried)}; {way_out}"
    raise DataError([line, *(f"  {line}" for lines in tried.values() for line in lines)])


def _candidates(seen: Seen, data_dir: Path, dataset: str | None, download: bool) -> Iterator[tuple[str, Path, bool]]:
    """What `load` takes, of each place once."""
    if dataset:
        yield dataset, data_dir, download
    elif seen.dataset in SOURCES:
        for directory in dict.fromkeys([data_dir.absolute(), *(Path(place).parent for place in seen.places)]):
            yield seen.dataset, directory, False
        if download:
            yield seen.dataset, data_dir, True
    else:
        for folder in dict.fromkeys(_resolved(place) for place in [*seen.places, seen.dataset]):
            yield folder, data_dir, False


def _resolved(path: Path | str) -> str:
    return os.path.realpath(os.path.expanduser(path))


def newest_first(places: Sequence[str], place: str | None) -> list[str]:
    """`places` with this one at the head; as they are where it is None."""
    return [place, *(other for other in places if other != place)][:MOST_PLACES] if place else list(places)
