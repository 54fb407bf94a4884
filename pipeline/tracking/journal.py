"""What a run measures reaches the disk first: a folder per run, `journal/<run key>/` in the home folder.

`records.jsonl` holds a record a line, appended (write-ahead logging: Mohan et al., ARIES, TODS 1992, without its undo);
`files/<n>/` the files that a record names; `before.json` what MLflow had of the run before this journal. shipping.py sends
it all to MLflow and removes the folder. Whoever writes or ships a journal holds the lock of its folder; a process that
dies loses it, and another one takes over.
"""

import contextlib
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

FOLDER = "journal"  # in the home folder
RECORDS = "records.jsonl"
_LOCK, _FILES, _BEFORE, _LEFT = "lock", "files", "before.json", "left"


class DiskFault(UserError):
    """The disk is full, or takes nothing for another reason."""


class Busy(Exception):
    """Another process writes or ships this journal."""


class Journal:
    """One run's folder, locked by this process as long as it is open; made where there is none.

    What a dead writer left is gone on with; its torn last line is cut off. Busy where another process has it, UserError where
    it is damaged, DiskFault where it can't be kept. Threads may share it.
    """

    def __init__(self, folder: Path, patience_s: float = 0.0):
        self.folder = folder
        self.key = folder.name
        self._lock = threading.Lock()
        self._lock_file = _lock(folder, patience_s)
        self.is_new = not (folder / RECORDS).exists()
        try:
            with _clear(folder):
                self._file = os.open(folder / RECORDS, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except BaseException:
            os.close(self._lock_file)
            raise
        self.size = _end_of_the_last_whole_line(folder / RECORDS)
        os.ftruncate(self._file, self.size)
        self.has_ended = False
        self._highest: dict[str, int] = {}  # the last step of each metric
        try:
            for record, _ in self.read(0):
                self._note(record)
        except UserError:
            self.release()
            raise

    def append(self, record: Mapping[str, Any], durable: bool = False) -> None:
        """One record more, all of it or nothing; on disk when it returns where it is `durable`, else soon.

        UserError where it is damaged, DiskFault where it can't be kept.
        """
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with self._lock, _clear(self.folder):
            try:
                _write(self._file, line)
                if durable:
                    os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, self.size)
                raise
            self.size += len(line)
            self._note(record)

    def append_metrics(self, values: Mapping[str, float], step: int, durable: bool) -> None:
        """A point each; of a name's steps each is kept once, the first time: a resumed run measures some again."""
        fresh = {name: value for name, value in values.items() if step > self._highest.get(name, -1)}
        if fresh:
            now = int(time.time() * 1000)
            self.append({"kind": "metrics", "step": step, "time": now, "values": fresh}, durable)

    def append_files(self, folder: Path) -> None:
        """The files below a folder, which may go afterwards: linked where that can be, else copied."""
        with _clear(self.folder):
            (self.folder / _FILES).mkdir(exist_ok=True)
            number = 1 + max((int(there.name) for there in (self.folder / _FILES).iterdir()), default=0)
            staged = self.folder / _FILES / str(number)
            try:
                shutil.copytree(folder, staged, copy_function=_link_or_copy)
            except OSError:
                shutil.rmtree(staged, ignore_errors=True)
                raise
        self.append({"kind": "files", "folder": staged.name})

    def next_step(self, prefix: str) -> int:
        """The step after the last one of all metrics whose names begin so, from 0."""
        return 1 + max((step for name, step in self._highest.items() if name.startswith(prefix)), default=-1)

    def read(self, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
        """The records from a byte on, each with the byte behind it."""
        with (self.folder / RECORDS).open("rb") as file:
            file.seek(offset)
            while offset < self.size:
                line = file.readline()
                offset += len(line)
                try:
                    record = json.loads(line)
                    record["kind"]
                except (ValueError, KeyError, TypeError):
                    raise UserError(
                        f"{self.folder / RECORDS}: damaged before byte {offset}; mend that line, or move the folder away"
                    ) from None
                yield record, offset

    def staged(self, name: str) -> Path | None:
        """The folder of a record's files; None where they were shipped."""
        folder = self.folder / _FILES / name
        return folder if folder.is_dir() else None

    def shipped(self, staged: Path) -> None:
        """These files are no longer needed."""
        shutil.rmtree(staged, ignore_errors=True)

    @property
    def before(self) -> dict[str, int] | None:
        """The last step of each metric that MLflow had before this journal; None as long as nobody has asked it."""
        try:
            return dict(json.loads((self.folder / _BEFORE).read_bytes()))
        except FileNotFoundError:
            return None

    @before.setter
    def before(self, steps: Mapping[str, int]) -> None:
        with _clear(self.folder):
            new = self.folder / f"{_BEFORE}.new"
            new.write_text(json.dumps(steps))
            new.replace(self.folder / _BEFORE)

    @property
    def is_left(self) -> bool:
        """Whether its process was told that the run isn't its own any more."""
        return (self.folder / _LEFT).exists()

    def leave(self, is_left: bool = True) -> None:
        """Mark it so, or take the mark away: who goes on with the run in this folder needs what is in it."""
        with _clear(self.folder):
            if is_left:
                (self.folder / _LEFT).touch()
            else:
                (self.folder / _LEFT).unlink(missing_ok=True)

    def release(self) -> None:
        """Let another process have it."""
        os.close(self._file)
        os.close(self._lock_file)

    def remove(self) -> None:
        """All of it is in MLflow."""
        (self.folder / RECORDS).unlink(
            missing_ok=True
        )  # first: what a kill leaves holds nothing that would be shipped again
        shutil.rmtree(self.folder, ignore_errors=True)
        self.release()

    def _note(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "metrics":
            self._highest |= dict.fromkeys(record["values"], record["step"])
        elif record["kind"] in ("start", "end"):
            self.has_ended = record["kind"] == "end"


def journals(home: Path) -> list[Path]:
    """The folders of all journals in a home folder, the oldest first."""
    found = [folder for folder in (home / FOLDER).glob("*") if (folder / RECORDS).exists()]
    return sorted(found, key=lambda folder: folder.stat().st_ctime_ns)


def remains(home: Path) -> list[Path]:
    """The folders that hold no records, of processes that died while they made or removed them."""
    return [path for path in (home / FOLDER).glob("*") if not (path / RECORDS).exists() and not is_busy(path)]


def address_of(folder: Path) -> str | None:
    """The tracker that a journal was made for, by its first record; None where there is no whole one."""
    try:
        with (folder / RECORDS).open("rb") as file:
            return str(json.loads(file.readline())["address"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_busy(folder: Path) -> bool:
    """Whether a living process writes or ships it."""
    try:
        file = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def _lock(folder: Path, patience_s: float) -> int:
    """The locked lock file of a folder that is there."""
    give_up = time.monotonic() + patience_s
    while True:
        with _clear(folder):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # whoever shipped it has just removed it
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, folder / _LOCK):
                return file
        except BlockingIOError:
            if time.monotonic() > give_up:
                os.close(file)
                raise Busy(folder.name) from None
            time.sleep(0.1)
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False


@contextlib.contextmanager
def _clear(folder: Path) -> Iterator[None]:
    """What the disk refuses is told in one line."""
    try:
        yield
    except OSError as error:
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror
        raise DiskFault(
            f"{folder}: can't be written ({reason}): free space on this disk, or mend it; what was measured is kept, and "
            "the same command goes on"
        ) from None


def _write(file: int, content: bytes) -> None:
    """All of it: a disk that fills takes a part, and refuses the rest."""
    while content:
        content = content[os.write(file, content) :]


def _end_of_the_last_whole_line(path: Path) -> int:
    return path.read_bytes().rfind(b"\n") + 1


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
