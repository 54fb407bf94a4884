"""The test split of a data set of files that comes without one: drawn once, and fixed by a file in mlruns/splits/.

An image is known by its path and its group. What is added to the data set later trains, unless its group is sealed; so the
test split stays what it was, and models of before and after are compared on the same images. To draw anew, remove the file.
Other folders and manifests of the same files share their sealed images, so that what tests one model doesn't train the next.
"""

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from filelock import FileLock

from pipeline.data.listing import TEST, TRAIN, VALIDATION, Listing, check_groups, first, root_of
from pipeline.data.splits import sealed
from pipeline.disk import replacing
from pipeline.errors import DataError, Problem, UserError

SEED = 20_261_129  # never change it: it seals the test splits
FOLDER = "splits"  # below mlruns

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seal:
    """Which images of a data set are its test split."""

    place: str  # the data set's folder or manifest when it was drawn
    listing: str  # digest of the data set's paths and classes then
    fraction: float
    paths: tuple[str, ...]  # below the data set's root, sorted
    groups: tuple[str, ...]  # sorted; empty where the data set has none
    shared: tuple[str, ...] = ()  # names of the files of other seals, whose images it has taken over

    @classmethod
    def draw(cls, listing: Listing, fraction: float, home: Path | None = None) -> Self:
        """Of the training images, stratified and by group; UserError where they are too few.

        What other data sets of the same files have sealed below `home` stays sealed. So many may be enough: others are drawn
        only if these are less than half of the fraction. DataError where that divides a group.
        """
        before = cls._of_others(listing, fraction, home)
        listing = before.apply(listing)
        chosen, rows = (np.flatnonzero(listing.splits == split) for split in (TEST, TRAIN))
        if 2 * len(chosen) < fraction * (len(chosen) + len(rows)):
            chosen = np.concatenate([chosen, _drawn(listing, rows, fraction)])
        groups = () if listing.groups is None else tuple(sorted(set(listing.groups[chosen].tolist())))
        return replace(before, paths=tuple(sorted(listing.names[row] for row in chosen)), groups=groups)

    @classmethod
    def _of_others(cls, listing: Listing, fraction: float, home: Path | None) -> Self:
        """The images that are sealed already, as parts of whatever data set of the same files; there may be none."""
        readable, damaged = cls._all(home) if home else ({}, {})
        for error in damaged.values():
            log.warning("%s; it may be of another data set: this one's test split is drawn without it", error)
        seals = {file.name: seal for file, seal in readable.items()}
        names = {file: found for file, seal in seals.items() if (found := seal._names_in(listing))}
        return cls(
            place=str(listing.place),
            listing=_digest(listing),
            fraction=fraction,
            paths=tuple(sorted(set().union(*names.values()))),
            groups=tuple(sorted({group for file in names for group in seals[file].groups})),
            shared=tuple(names),
        )

    def _names_in(self, listing: Listing) -> set[str]:
        """What the listing calls the images of this seal that it has."""
        root, prefix = os.path.realpath(root_of(self.place)), os.path.join(os.path.realpath(listing.root), "")
        files = (os.path.join(root, path) for path in self.paths)
        return {file.removeprefix(prefix) for file in files if file.startswith(prefix)}.intersection(listing.names)

    @classmethod
    def find(cls, listing: Listing, home: Path) -> Self | None:
        """The one of this data set: drawn at this place, or wherever the same paths lay.

        DataError where one with the name of this data set is damaged and no other one is its, or where most of its images
        are gone and a few are not: then nobody knows whether this is the data set, or another one that has some names in
        common with it.
        """
        seals, damaged = cls._all(home)
        names, place = set(listing.names), str(listing.place)
        real = os.path.realpath(place)  # as `find_data` names it, whatever link was typed when it was drawn
        here = {
            file: len(names.intersection(seal.paths))
            for file, seal in seals.items()
            if os.path.realpath(seal.place) == real
        }
        if here and (left := max(here.values())):
            file = max(here, key=here.__getitem__)
            if 2 * left < (drawn := len(seals[file].paths)):
                rule = f"only {left} of the {drawn} images are left that {file} has sealed: is it another data set?"
                remedy = "if it is, remove that file, and another test split is drawn; else bring the images back"
                raise DataError(place, rule, remedy)
            return seals[file]
        digest = _digest(listing) if seals else ""
        found = next((replace(seal, place=place) for seal in seals.values() if seal.listing == digest), None)
        own = [error for file, error in damaged.items() if file.stem.rpartition("-")[0] == listing.short_name]
        if own and not found:
            raise own[0]
        return found

    @classmethod
    def _all(cls, home: Path) -> tuple[dict[Path, Self], dict[Path, DataError]]:
        """Those that can be read, and why the others can't."""
        seals, damaged = {}, {}
        for file in sorted((home / FOLDER).glob("*.json")):
            try:
                seals[file] = cls._read(file)
            except DataError as error:
                damaged[file] = error
        return seals, damaged

    @classmethod
    def _read(cls, file: Path) -> Self:
        try:
            values = {"shared": ()} | json.loads(file.read_text(encoding="utf-8"))
            return cls(**values | {name: tuple(values[name]) for name in ("paths", "groups", "shared")})
        except (OSError, ValueError, TypeError, KeyError) as error:
            rule = f"which fixes a test split, can't be read ({error})"
            raise DataError(str(file), rule, "restore it; without it the test split is drawn anew") from None

    def apply(self, listing: Listing) -> Listing:
        """The listing with its test split; DataError where that divides a group, drawn without it, or takes all of a class."""
        paths = set(self.paths)
        is_test = np.array([name in paths for name in listing.names])
        if listing.groups is not None:
            is_test |= np.isin(listing.groups, self.groups)
        result = listing.with_splits(np.where(is_test, TEST, listing.splits))
        remove = f"remove {' and '.join(self.shared) or 'the seal'} in mlruns/{FOLDER}, and another test split is drawn"
        remedy = f"its test images were sealed without these groups: {remove}; or leave out the column group"
        check_groups(result, remedy)
        trained = set(result.usable.labels.tolist())
        if problems := [
            Problem(f"{listing.place.name}, class {name}", "all its images are sealed", f"add some, or {remove}")
            for label, name in enumerate(listing.classes)
            if label not in trained
        ]:
            raise DataError.many(first(problems))
        return result

    def lines(self, listing: Listing) -> list[str]:
        """What a person should know of it, a line each; `listing` has this test split."""
        is_test = listing.splits == TEST
        of = f"{is_test.sum():,} of {len(is_test):,} images"
        lines = [f"test split of {listing.place.name}: {of} are sealed; only `promote` decides by them"]
        if self.shared:
            files = f"mlruns/{FOLDER}/{', '.join(self.shared)}"
            lines.append(f"these include the images of it that were sealed before, by {files}")
        known = set(listing.labels[is_test].tolist())
        missing = [name for label, name in enumerate(listing.classes) if label not in known]
        if missing:
            lines.append(f"it has no images of {', '.join(missing[:10])}, about which promotion will say nothing")
        return lines

    def fix(self, home: Path, listing: Listing) -> None:
        """Write it, if it is not there yet; DataError where another command has drawn another one meanwhile."""
        folder = home / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        identity = hashlib.sha256(json.dumps([self.place, self.paths]).encode()).hexdigest()
        file = folder / f"{listing.short_name}-{identity[:8]}.json"
        with FileLock(folder / ".lock"):
            if any(folder.glob(f"*-{identity[:8]}.json")):  # whatever the data set, or a link to it, is called
                return
            found = Seal.find(listing, home)
            if found and found.paths != self.paths:
                rule = "another command has sealed another test split of it"
                raise DataError(str(listing.place), rule, "start again")
            with replacing(file) as new:
                new.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


def _drawn(listing: Listing, rows: np.ndarray, fraction: float) -> np.ndarray:
    """Which of these training images are drawn; UserError where they are too few."""
    numbers = listing.group_numbers
    groups = None if numbers is None else torch.from_numpy(numbers[rows])
    labels = torch.from_numpy(listing.labels[rows])
    try:
        if groups is None and not listing.has(VALIDATION):
            _check_enough(listing, rows)
        usable, _ = sealed(labels, fraction, SEED, groups, listing.classes)
    except UserError as error:
        remedy = "`--test-fraction 0` seals none, and nothing can be promoted"
        raise UserError.many([replace(problem, remedy=remedy) for problem in error.problems]) from None
    return np.delete(rows, usable.numpy())


def _check_enough(listing: Listing, rows: np.ndarray) -> None:
    """UserError for each class that would have no image left to validate or to train on."""
    counts = np.bincount(listing.labels[rows], minlength=len(listing.classes))
    problems = [
        Problem(f"{listing.place}, class {name}", f"has {count} images; training, validation and test need one each")
        for name, count in zip(listing.classes, counts.tolist(), strict=True)
        if count < 3
    ]
    if problems:
        raise UserError.many(first(problems))


def _digest(listing: Listing) -> str:
    """Of the images' paths and classes."""
    rows = sorted(zip(listing.names, (listing.classes[label] for label in listing.labels), strict=True))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
