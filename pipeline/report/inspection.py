"""A data set before anything is trained on it: what it consists of, and what is wrong with it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pipeline.data.datasets import MAX_IMBALANCE, SOURCES, listed, load
from pipeline.data.duplicates import find_duplicates
from pipeline.data.files import digest_of
from pipeline.data.images import read_image
from pipeline.data.listing import ORDER, TEST, TRAIN, VALIDATION
from pipeline.data.splits import partition
from pipeline.data.survey import Survey, survey_files, survey_pixels
from pipeline.errors import UserError, counted
from pipeline.registry.test_split import survey_test_split
from pipeline.report.label_suspects import Suspects, find_suspects
from pipeline.sections.data import Data, Form
from pipeline.tracking.tracker import MlflowTracker

DARK = 0.25  # of the range of 16 bits: 12- and 14-bit values stay below it


class DuplicateKind(NamedTuple):
    """Where the images of a set lie, and what to do about it."""

    where: str
    remedy: str


# By severity, the worst first.
DUPLICATES = (
    DuplicateKind(
        "in the test split and in what is trained on",
        "A model trained on such an image knows the answer. Exact copies don't train, unless `--duplicates keep` says so; "
        "remove the others from one side, or give each set a group in a manifest.",
    ),
    DuplicateKind(
        "in training and validation",
        "The validation score is too good by what such images add. Keep one of each, or give each set a group in a manifest.",
    ),
    DuplicateKind("under two classes", "At most one of the labels is right."),
    DuplicateKind("in one class and split", "They count double, but do little other harm."),
)


@dataclass(frozen=True)
class DuplicateSet:
    """Images that are the same, or nearly."""

    rows: tuple[int, ...]  # of the survey
    exact: tuple[int, ...]  # a number for each of the rows: the same where they are equal byte for byte
    splits: tuple[str, ...]  # that they lie in, training first
    num_classes: int  # that they lie in

    @property
    def is_copy(self) -> tuple[bool, ...]:
        """Of each row, whether another one is equal to it byte for byte."""
        counts = Counter(self.exact)
        return tuple(counts[number] > 1 for number in self.exact)

    @property
    def is_exact(self) -> bool:
        """Whether all are equal byte for byte."""
        return len(set(self.exact)) == 1

    @property
    def severity(self) -> int:
        """0: in the test split and elsewhere; 1: in training and validation; 2: under two classes; 3: none of these."""
        if len(self.splits) > 1:
            return 0 if TEST in self.splits else 1
        return 2 if self.num_classes > 1 else 3


@dataclass(frozen=True, eq=False)
class Inspection:
    """What was found. Rows of the survey: first what may train or validate, then the test split."""

    name: str
    dataset: str  # as it was named
    place: str  # a path, or what the data set is called
    classes: tuple[str, ...]
    survey: Survey
    notes: tuple[str, ...]  # what is to be known of files and splits, a line each
    duplicates: tuple[DuplicateSet, ...]  # the worst first
    suspects: Suspects | None
    suspect_rows: np.ndarray  # int64 (K,): the rows of the suspects
    picture: Callable[[int, int], np.ndarray]  # row and size -> uint8 (3, S, S), padded; not of the test split

    @cached_property
    def counts(self) -> dict[str, np.ndarray]:
        """Split -> images of each class, those that can't be read included."""
        unreadable = [(one.split, one.label) for one in self.survey.unreadable]
        places = Counter([*zip(self.survey.splits.tolist(), self.survey.labels.tolist(), strict=True), *unreadable])
        return {
            split: np.array([places[split, label] for label in range(len(self.classes))])
            for split in ORDER
            if any(of == split for of, _ in places)
        }

    def lines(self) -> list[str]:
        """The findings that matter, a line each, the worst first."""
        lines = []
        for severity, where in enumerate(kind.where for kind in DUPLICATES):
            sets = [one for one in self.duplicates if one.severity == severity]
            if sets:
                images, copies = (sum(len(one.rows) for one in sets), sum(sum(one.is_copy) for one in sets))
                lines.append(
                    f"{counted(len(sets), 'picture')} more than once {where}: {images:,} images, of which {copies:,} are "
                    "equal byte for byte to another"
                )
        if self.survey.unreadable:
            lines.append(f"{counted(len(self.survey.unreadable), 'file')} can't be read")
        if dark := int((self.survey.peaks < DARK).sum()):
            lines.append(
                f"{counted(dark, '16-bit image')} with less than a quarter of the range, so nearly black to a network: "
                "scale to 0 to 65,535 first, all by the same factor"
            )
        if self.suspects and len(self.suspects.ids):
            share = len(self.suspects.ids) / self.suspects.num_images
            of = f"{self.suspects.num_images:,} images ({100 * share:.1f} %)"
            lines.append(
                f"{counted(len(self.suspects.ids), 'suspected wrong label')} among {of}, by {self.suspects.source}"
            )
        train = self.counts.get(TRAIN, np.zeros(1))
        if train.max() >= MAX_IMBALANCE * train.min():
            most, least = self.classes[train.argmax()], self.classes[train.argmin()]
            lines.append(
                f"unbalanced: {most} has {train.max():,} training images, {least} {train.min():,}; "
                "`--set data.sampler=balanced` evens them out"
            )
        return lines or ["nothing was found that needs a decision"]


@dataclass(frozen=True, eq=False)
class _Source:
    """What may train or validate, surveyed."""

    name: str
    place: str
    classes: tuple[str, ...]
    survey: Survey
    groups: np.ndarray | None
    notes: tuple[str, ...]
    digest: Callable[[np.ndarray], str]  # bool (N,), the rows that a study uses -> the data set's digest in its runs
    picture: Callable[[int, int], np.ndarray]


def inspect(about: Data, data_dir: Path, home: Path, tracker: MlflowTracker | None) -> Inspection:
    """Look at all images of a data set; suspects where the tracker knows finished runs on it.

    Without a validation split of its own it is divided as a study's default does. DataError and UserError as `load`, but for
    files that can't be read.
    """
    source = _pixels(about, data_dir) if about.dataset in SOURCES else _files(about, home)
    test = survey_test_split(about, data_dir, home)
    sealed = set(test.prints.digests) if about.duplicates == "drop" and about.dataset not in SOURCES else set()
    is_used = np.array([digest not in sealed for digest in source.survey.prints.digests], dtype=bool)
    usable, notes = source.survey, list(source.notes)
    if not is_used.all():
        copies = counted(int((~is_used).sum()), "image")
        notes.append(f"a study leaves out {copies} of these, equal byte for byte to test images")
    if VALIDATION not in usable.splits:
        try:
            usable = usable.with_splits(_with_validation(source, is_used, about))
        except UserError as error:
            notes += [f"a study will refuse it: {line}" for line in error.lines]
    survey = usable.joined(test)
    suspects = find_suspects(tracker, source.digest(is_used)) if tracker else None
    return Inspection(
        name=source.name,
        dataset=about.dataset,
        place=source.place,
        classes=source.classes,
        survey=survey,
        notes=tuple(notes),
        duplicates=_duplicates(survey),
        suspects=suspects,
        suspect_rows=np.flatnonzero(is_used)[suspects.ids] if suspects else np.empty(0, np.int64),
        picture=source.picture,
    )


def _pixels(about: Data, data_dir: Path) -> _Source:
    natural = about.model_copy(update={"image_size": SOURCES[about.dataset].NATURAL_SIZE, "geometry": "squash"})
    data = load(natural, data_dir)
    images = data.train.images[:]
    return _Source(
        name=about.dataset,
        place=data.source,
        classes=data.classes,
        survey=survey_pixels(images, data.train.labels, TRAIN),
        groups=None,
        notes=(),
        digest=lambda is_used: data.digest,
        picture=lambda row, size: images[row].numpy(),
    )


def _files(about: Data, home: Path) -> _Source:
    found = listed(about, home)
    usable = found.listing.usable
    survey = survey_files(usable)
    known = set(survey.names.tolist())  # of objects np.isin compares all pairs
    readable = usable.where(np.array([name in known for name in usable.names], dtype=bool))

    def digest(is_used: np.ndarray) -> str:
        digests = [one for one, used in zip(survey.prints.digests, is_used, strict=True) if used]
        return digest_of(readable.where(is_used), digests)

    files = readable.files
    return _Source(
        name=found.listing.short_name,
        place=str(found.listing.place),
        classes=found.listing.classes,
        survey=survey,
        groups=readable.group_numbers,
        notes=tuple(found.facts()),
        digest=digest,
        picture=lambda row, size: read_image(Path(files[row]), Form(size, "pad")),
    )


def _with_validation(source: _Source, is_used: np.ndarray, about: Data) -> np.ndarray:
    """str (N,): which images train and which validate in a study that changes nothing about it."""
    rows = np.flatnonzero(is_used)
    labels = torch.from_numpy(source.survey.labels[rows])
    groups = None if source.groups is None else torch.from_numpy(source.groups[rows])
    parts = partition(labels, about.validation_fraction, about.split_seed, groups, source.classes)
    splits = np.full(len(is_used), TRAIN, dtype=object)
    splits[rows[parts.validation.numpy()]] = VALIDATION
    return splits


def _duplicates(survey: Survey) -> tuple[DuplicateSet, ...]:
    found = find_duplicates(survey.prints)
    sets = [
        DuplicateSet(
            rows=tuple(rows.tolist()),
            exact=tuple(found.exact[rows].tolist()),
            splits=tuple(sorted(set(survey.splits[rows].tolist()), key=ORDER.index)),
            num_classes=len(set(survey.labels[rows].tolist())),
        )
        for rows in found.sets()
    ]
    return tuple(sorted(sets, key=lambda one: (one.severity, not one.is_exact, one.rows)))
