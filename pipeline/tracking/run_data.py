"""The data set that a run saw, opened again: by its digest, wherever it lies now."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.datasets import SOURCES, Dataset, load
from pipeline.errors import DataError, UserError
from pipeline.sections.data import Data

MAX_PLACES = 10  # that are kept of a study


@dataclass(frozen=True)
class RunData:
    """The data set that a run was trained on, and where it may lie."""

    owner: str  # whose it is, for messages
    about: Data  # the data set as `load` takes it, by the run's recipe
    digest: str
    places: Sequence[str]  # the newest first, as `queries.data_places` has them
    home: Path | None = None  # the folder mlruns, whose files fix test splits


@dataclass(frozen=True, eq=False)
class LocatedData:
    """A run's data set, opened, and what `load` and the opener of the test split take to open it again."""

    images: Dataset
    about: Data
    data_dir: Path


def find_data(run_data: RunData, data_dir: Path, dataset: str | None = None, download: bool = True) -> LocatedData:
    """The data set of the run, from the first place whose images have its digest.

    Where `dataset` is given, a name, a folder or a manifest, only that is tried. Else the known places and the one
    that the recipe names; for CIFAR-10 `data_dir` comes first, and where no place has it, it is downloaded there.
    DataError with a line for each place that was tried.
    """
    tried: dict[str, list[str]] = {}  # place -> why it isn't there
    for name, directory, may_download in _candidates(run_data, data_dir, dataset, download):
        place = str(directory.absolute()) if name in SOURCES else _resolved(name)
        if not dataset and name not in SOURCES and not os.path.lexists(name):
            tried[place] = [f"{name}: no such folder"]
            continue
        try:
            about = run_data.about.model_copy(update={"dataset": name})
            images = load(about, directory, run_data.home, may_download)
        except UserError as error:
            tried[place] = error.lines
            continue
        if images.digest == run_data.digest:
            return LocatedData(images, about, directory)
        tried[place] = [f"{images.source}: holds other images, digest {images.digest[:12]}"]
    is_named = run_data.about.dataset in SOURCES
    raise DataError(
        run_data.owner,
        f"its data set, digest {run_data.digest[:12]}, is not in {' or '.join(tried)}",
        f"name {'its folder by `--data-dir`' if is_named else 'the folder or manifest where it lies now by `--dataset`'}",
        [line for lines in tried.values() for line in lines],
    )


def _candidates(
    run_data: RunData, data_dir: Path, dataset: str | None, download: bool
) -> Iterator[tuple[str, Path, bool]]:
    """The arguments of `load`, each place once."""
    if dataset:
        yield dataset, data_dir, download
    elif run_data.about.dataset in SOURCES:
        for directory in dict.fromkeys([data_dir.absolute(), *(Path(place).parent for place in run_data.places)]):
            yield run_data.about.dataset, directory, False
        if download:
            yield run_data.about.dataset, data_dir, True
    else:
        for folder in dict.fromkeys(_resolved(place) for place in [*run_data.places, run_data.about.dataset]):
            yield folder, data_dir, False


def _resolved(path: Path | str) -> str:
    return os.path.realpath(os.path.expanduser(path))


def newest_first(places: Sequence[str], place: str | None) -> list[str]:
    """`places` with this one at the head; as they are where it is None."""
    return [place, *(other for other in places if other != place)][:MAX_PLACES] if place else list(places)
