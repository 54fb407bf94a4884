"""Image files -> pixels, which stay on disk in mlruns/cache: decoded once, for all trials, workers and later commands.

A cache is a folder for each data set and form: files of pixels, and an index with a record for each image. They only grow,
some images at a time, pixels first. So a killed command loses seconds of work, no image changes under a running training,
and a file that was changed is decoded again, into a row of its own.
"""

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
import PIL
import torch
from filelock import FileLock, Timeout

from pipeline.data import images as decoder
from pipeline.data.images import BadImage, Decoded, FileImage, HeldImages, check_memory, read_images
from pipeline.data.listing import Listing, first
from pipeline.data.mapped import MappedImages, PixelFile, sums_of
from pipeline.errors import DataError, Problem
from pipeline.sections.data import Form

FOLDER = "cache"  # below mlruns
RESERVE = 2 * 2**30  # bytes of the disk that stay free, for runs
CHUNK = 64 * 2**20  # bytes that become part of a cache together
PROGRESS_S = 10.0  # between two lines of progress
IMAGES, HELD, INDEX = "images", "held", "index"  # files of a cache
FIELDS = {IMAGES: "image", HELD: "held"}  # of FileImage
_SKIP = "replace or remove them, or `--corrupt skip` leaves them out"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

log = logging.getLogger(__name__)
_on_progress: ContextVar[Callable[[], None]] = ContextVar("on_progress", default=lambda: None)


@contextlib.contextmanager
def reading(on_progress: Callable[[], None]) -> Iterator[None]:
    """Call `on_progress` for each image that is read in the block, and each second that another command is waited for.

    Reading may take hours, of which a worker has to give a sign of life; what `on_progress` raises ends it, and what is
    decoded by then stays.
    """
    token = _on_progress.set(on_progress)
    try:
        yield
    finally:
        _on_progress.reset(token)


def decoded(listing: Listing, form: Form, home: Path, skip: bool = False) -> Decoded:
    """The images of a listing in a form.

    What the cache in `home` lacks is decoded by all cores and added to it. A file is known by path, size and times.
    DataError for too small a disk, and one for all the files that can't be read, unless they may be skipped.
    """
    cache = _Cache(home / FOLDER / _name(listing, form), form)
    try:
        cache.folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(cache.folder):
            cache.folder.mkdir(exist_ok=True)  # in here: who has the lock may remove it
            return cache.complete(listing, skip)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise _too_small(cache.folder, "the disk is full, and what is decoded by now stays") from None
        raise DataError(str(error.filename or cache.folder), error.strerror or str(error)) from None


def in_memory(listing: Listing, form: Form, skip: bool = False) -> Decoded:
    """As `decoded`, without a cache. UserError where they are too many for that."""
    check_memory(len(listing.names), form)
    count, side = len(listing.names), form.held or 0
    images = np.empty((count, 3, form.size, form.size), dtype=np.uint8)
    held = np.empty((count, 3, side, side), dtype=np.uint8)
    aspects, rows, digests = torch.ones(count), list[int](), list[bytes]()
    unreadable: list[BadImage] = []
    for number, file in _read(listing.files, form, unreadable, skip, count):
        index = len(rows)
        images[index], aspects[index] = file.image, file.aspect
        rows.append(number)
        digests.append(file.sha256)
        if file.held is not None:
            held[index] = file.held
    end = len(rows)
    to_crop = HeldImages(torch.from_numpy(held[:end]), aspects[:end]) if form.held else None
    return Decoded(np.array(rows, dtype=np.int64), torch.from_numpy(images[:end]), to_crop, digests, unreadable)


def in_batches(
    listing: Listing, form: Form, count: int, skip: bool, remedy: str
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """The images as they are read, `count` at a time, of which nothing is kept: rows int64 (B,), uint8 (B, 3, S, S).

    DataError, with this remedy, where there are some that can't be read, unless `skip`.
    """
    images = _read(listing.files, form, [], skip, len(listing.names), remedy)
    while batch := list(islice(images, count)):
        yield np.array([row for row, _ in batch]), torch.from_numpy(np.stack([file.image for _, file in batch]))


def caches(home: Path) -> list[Path]:
    """The folders of all caches, those first that were not used for longest."""
    folders = [path for path in (home / FOLDER).glob("*") if path.is_dir()]
    return sorted(folders, key=lambda path: path.stat().st_mtime)


def num_bytes(cache: Path) -> int:
    """What it takes on disk."""
    return sum(file.stat().st_size for file in cache.iterdir())


def remove(cache: Path) -> bool:
    """Remove a cache, unless a command writes it. Whoever reads it reads on."""
    try:
        with _lock(cache).acquire(timeout=0), contextlib.suppress(FileNotFoundError):  # two may make room at once
            shutil.rmtree(cache)
    except Timeout:
        return False
    return True


def in_words(count: int) -> str:
    """`5.1 GiB`, `12 MiB`."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _lock(cache: Path) -> FileLock:
    return FileLock(cache.with_name(f"{cache.name}.lock"))


@contextlib.contextmanager
def _locked(cache: Path) -> Iterator[None]:
    lock, is_said = _lock(cache), False
    while not lock.is_locked:
        try:
            lock.acquire(timeout=1)
        except Timeout:
            if not is_said:
                log.info("another command decodes images to %s: waiting for it", cache)
            is_said = True
            _on_progress.get()()
    try:
        yield
    finally:
        lock.release()


def _name(listing: Listing, form: Form) -> str:
    """Made of the data set's place, the form, and the code that decodes: of another version, pixels may be others."""
    identity: list[object] = [
        os.path.realpath(listing.place),
        form,
        PIL.__version__,
        Path(decoder.__file__).read_bytes(),
    ]
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:8]
    return "-".join(
        [listing.short_name, form.geometry, *(str(size) for size in (form.size, form.held) if size), digest]
    )


def _too_small(cache: Path, rule: str) -> DataError:
    return DataError(str(cache), rule, "free some space (`clean-cache` may help), or lower data.image_size")


def _read(
    files: Sequence[str], form: Form, unreadable: list[BadImage], skip: bool, total: int, remedy: str = _SKIP
) -> Iterator[tuple[int, FileImage]]:
    """The images and their numbers, in their order; at the end, one DataError for all the files that can't be read.

    With `skip` they are only added to `unreadable`. `total`: of how many images these are the ones that are read now.
    """
    log.info("reading %s images at %d x %d pixels, %s", f"{len(files):,}", form.size, form.size, form.geometry)
    said = time.monotonic()
    for number, result in enumerate(read_images(map(Path, files), form, digests=True)):
        _on_progress.get()()
        if time.monotonic() - said > PROGRESS_S:
            log.info("%s of %s images read", f"{number:,}", f"{len(files):,}")
            said = time.monotonic()
        if isinstance(result, BadImage):
            unreadable.append(result)
        else:
            yield number, result
    if unreadable and not skip:
        raise _unusable(unreadable, total, remedy)


def _unusable(unreadable: Sequence[BadImage], count: int, remedy: str) -> DataError:
    problems = first([problem for image in unreadable for problem in image.problems])
    return DataError.many([*problems, Problem(f"{len(unreadable)} of {count} images can't be used", remedy=remedy)])


def _keys(files: Sequence[str]) -> list[bytes]:
    """32 bytes for each file by which it is known: of its path, size and times."""

    def key(file: str) -> bytes:
        about: list[object] = [file]
        with contextlib.suppress(OSError):  # who reads it will say so
            stat = os.stat(file)
            about += [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]  # programs can set the one, but not the other
        return hashlib.sha256(repr(about).encode()).digest()

    return list(map(key, files))


class _Cache:
    """A cache's files. Whoever calls `complete` has the lock."""

    def __init__(self, folder: Path, form: Form):
        self.folder, self._form = folder, form
        self.sizes = {IMAGES: form.size} | ({HELD: form.held} if form.held else {})  # file -> height and width
        sums = ("sums", "<i8", (len(self.sizes), 2, 3))  # see MappedImages, in the order of the files
        self.record = np.dtype([("key", "V32"), ("sha256", "V32"), ("aspect", "<f4"), sums])

    @property
    def row_bytes(self) -> dict[str, int]:
        """What an image takes in each file; the index comes last."""
        return {name: 3 * size**2 for name, size in self.sizes.items()} | {INDEX: self.record.itemsize}

    def complete(self, listing: Listing, skip: bool) -> Decoded:
        """The images in the listing's order; decodes what isn't there yet, and tries again what can't be read."""
        unreadable: list[BadImage] = []
        files, records = listing.files, self._records()
        keys = _keys(files)
        missing = _missing(keys, records)
        if missing and len(records) + len(missing) > 2 * len(keys):  # most would be of files that aren't these
            shutil.rmtree(self.folder)
            self.folder.mkdir()
            records = records[:0]
            missing = _missing(keys, records)
        if missing:
            self._make_room(len(missing))
            with _Writer(self, len(records)) as writer:
                wanted = [files[number] for number in missing]
                for number, file in _read(wanted, self._form, unreadable, skip, len(files)):
                    writer.add(keys[missing[number]], file)
            records = self._records()
        os.utime(self.folder)  # `caches` sorts by it
        row_of = _row_of_key(records)
        numbers = [number for number, key in enumerate(keys) if key in row_of]
        if not numbers:
            raise _unusable(unreadable, len(files), "replace them")
        images, held, digests = self._images(
            records, np.array([row_of[keys[number]] for number in numbers], dtype=np.int64)
        )
        return Decoded(np.array(numbers, dtype=np.int64), images, held, digests, unreadable)

    def _records(self) -> np.ndarray:
        """Of the complete rows; a killed writer leaves parts behind them."""
        files = {self.folder / name: size for name, size in self.row_bytes.items()}
        if not all(file.exists() for file in files):
            return np.empty(0, self.record)
        return np.fromfile(self.folder / INDEX, self.record, min(f.stat().st_size // size for f, size in files.items()))

    def _make_room(self, count: int) -> None:
        """Say how much will be written, and make room; DataError where there is none, even without the other caches."""
        needed = count * sum(self.row_bytes.values())
        log.info("decoding once, to %s: %s", self.folder, in_words(needed))
        others = [cache for cache in caches(self.folder.parents[1]) if cache.name != self.folder.name]
        if shutil.disk_usage(self.folder).free + sum(map(num_bytes, others)) < needed + RESERVE:
            others = []  # that wouldn't be enough, and decoding them took hours
        while (free := shutil.disk_usage(self.folder).free) < needed + RESERVE:
            if not others:
                stay = f"{in_words(RESERVE)} of the disk must stay free, and {in_words(free)} are"
                raise _too_small(self.folder, f"takes {in_words(needed)} more; {stay}")
            if remove(others[0]):
                log.info("removed %s, unused for longest, to make room", others[0])
            del others[0]

    def _images(self, records: np.ndarray, rows: np.ndarray) -> tuple[MappedImages, HeldImages | None, list[bytes]]:
        used = records[rows]
        images, *held = (
            MappedImages(PixelFile(self.folder / name, size), size, rows, used["sums"][:, number])
            for number, (name, size) in enumerate(self.sizes.items())
        )
        to_crop = HeldImages(held[0], torch.from_numpy(used["aspect"].copy())) if held else None
        digests = used["sha256"].tobytes()
        return images, to_crop, [digests[32 * row : 32 * row + 32] for row in range(len(rows))]


def _row_of_key(records: np.ndarray) -> dict[bytes, int]:
    keys = records["key"].tobytes()
    return {keys[32 * row : 32 * row + 32]: row for row in range(len(records))}


def _missing(keys: Sequence[bytes], records: np.ndarray) -> list[int]:
    """The numbers of the keys that no record has."""
    known = _row_of_key(records)
    return [number for number, key in enumerate(keys) if key not in known]


class _Writer:
    """Appends rows to a cache; those of a chunk become part of it together, once their pixels are safe on disk."""

    def __init__(self, cache: _Cache, rows: int):
        """`rows` are there; what lies behind them is cut off."""
        self._cache = cache
        self._waiting: list[tuple[bytes, FileImage]] = []
        self._chunk = max(1, CHUNK // sum(cache.row_bytes.values()))  # rows
        self._files = {name: (cache.folder / name).open("ab", buffering=0) for name in cache.row_bytes}
        for name, file in self._files.items():
            file.truncate(rows * cache.row_bytes[name])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Also where an image can't be read or a person stops it: what is decoded stays."""
        try:
            self._flush()
        finally:
            for file in self._files.values():
                file.close()

    def add(self, key: bytes, file: FileImage) -> None:
        """An image and its key; OSError where the disk refuses."""
        self._waiting.append((key, file))
        if len(self._waiting) == self._chunk:
            self._flush()

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []  # first: what fails is not written again
        if not waiting:
            return
        records = np.empty(len(waiting), self._cache.record)
        records["key"] = [np.void(key) for key, _ in waiting]
        records["sha256"] = [np.void(file.sha256) for _, file in waiting]
        records["aspect"] = [file.aspect for _, file in waiting]
        for number, name in enumerate(self._cache.sizes):
            pixels = np.stack([getattr(file, FIELDS[name]) for _, file in waiting])
            records["sums"][:, number] = sums_of(pixels)
            _write(self._files[name], pixels)
        _write(self._files[INDEX], records)


def _write(file: FileIO, values: np.ndarray) -> None:
    left = values.tobytes() if values.dtype.fields else values.data.cast("B")
    while left:
        left = left[file.write(left) :]
    os.fsync(file.fileno())
