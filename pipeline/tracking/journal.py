"""What a run measures reaches the disk first: a folder per run, `journal/<run key>/` in the folder mlruns.

`records.jsonl` holds a record a line, appended (write-ahead logging: Mohan et al., ARIES, TODS 1992, without its undo);
`files/<n>/` the files that a record names; `steps_before.json` the steps that MLflow had before this journal. uploader.py
sends it all to MLflow and removes the folder. The process that writes and sends a journal holds the lock of its folder;
the kernel releases the lock when the process dies, and another process can take over.
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

from pipeline.disk import replacing
from pipeline.errors import UserError

FOLDER = "journal"  # in the folder mlruns
RECORDS = "records.jsonl"
_LOCK, _FILES, _STEPS_BEFORE, _DISOWNED = "lock", "files", "steps_before.json", "disowned"


class DiskFault(UserError):
    """The disk is full, or can't be written for another reason."""


class Busy(Exception):
    """Another process writes or sends this journal."""


class Journal:
    """One run's folder, locked by this process as long as it is open; created where it is missing.

    The journal of a dead process is resumed; its incomplete last line is cut off. Busy where another process has it after
    `timeout_s`, UserError where it is damaged, DiskFault where it can't be written. Threads may share it.
    """

    def __init__(self, folder: Path, timeout_s: float = 0.0):
        self.folder = folder
        self.key = folder.name
        self._lock = threading.Lock()
        self._lock_file = _lock(folder, timeout_s)
        self.is_new = not (folder / RECORDS).exists()
        try:
            with _as_disk_fault(folder):
                if self.is_new:  # what a killed removal left is of the journal before
                    (folder / _STEPS_BEFORE).unlink(missing_ok=True)
                self._file = os.open(folder / RECORDS, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except BaseException:
            os.close(self._lock_file)
            raise
        self.size = _end_of_last_complete_line(folder / RECORDS)
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
        """Append a record, all of it or nothing; `durable`: on disk when this returns, else soon. DiskFault on failure."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with self._lock, _as_disk_fault(self.folder):
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
        """A point of each metric. A metric keeps the first value of each step: a resumed run measures some steps again."""
        fresh = {name: value for name, value in values.items() if step > self._highest.get(name, -1)}
        if fresh:
            time_ms = int(time.time() * 1000)
            self.append({"kind": "metrics", "step": step, "time": time_ms, "values": fresh}, durable)

    def append_files(self, folder: Path) -> None:
        """The files below a folder, which may be removed afterwards: they are linked where possible, else copied."""
        with _as_disk_fault(self.folder):
            (self.folder / _FILES).mkdir(exist_ok=True)
            number = 1 + max((int(path.name) for path in (self.folder / _FILES).iterdir()), default=0)
            staged = self.folder / _FILES / str(number)
            try:
                shutil.copytree(folder, staged, copy_function=_link_or_copy)
            except OSError:
                shutil.rmtree(staged, ignore_errors=True)
                raise
        self.append({"kind": "files", "folder": staged.name})

    def next_step(self, prefix: str) -> int:
        """The step after the last one of all metrics with this prefix, from 0."""
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
                    rule, remedy = f"damaged before byte {offset}", "repair that line, or move the folder away"
                    raise UserError(str(self.folder / RECORDS), rule, remedy) from None
                yield record, offset

    def staged(self, name: str) -> Path | None:
        """The folder of a record's files; None where they were sent."""
        folder = self.folder / _FILES / name
        return folder if folder.is_dir() else None

    def remove_staged(self, staged: Path) -> None:
        """Remove files that were sent."""
        shutil.rmtree(staged, ignore_errors=True)

    @property
    def steps_before(self) -> dict[str, int] | None:
        """The last step of each metric that MLflow had before this journal; None as long as MLflow has not answered.

        None also where a power failure has damaged them: MLflow is asked again.
        """
        try:
            return dict(json.loads((self.folder / _STEPS_BEFORE).read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    @steps_before.setter
    def steps_before(self, steps: Mapping[str, int]) -> None:
        with _as_disk_fault(self.folder), replacing(self.folder / _STEPS_BEFORE) as new:
            new.write_text(json.dumps(steps))

    @property
    def is_disowned(self) -> bool:
        """Whether the process that wrote it lost the run to another one."""
        return (self.folder / _DISOWNED).exists()

    def disown(self) -> None:
        """Mark it so: where nobody resumes the run in this folder, it is not sent."""
        with _as_disk_fault(self.folder):
            (self.folder / _DISOWNED).touch()

    def own(self) -> None:
        """Remove the mark: who resumes the run in this folder needs all that is in it."""
        with _as_disk_fault(self.folder):
            (self.folder / _DISOWNED).unlink(missing_ok=True)

    def release(self) -> None:
        """Unlock it for other processes."""
        os.close(self._file)
        os.close(self._lock_file)

    def remove(self) -> None:
        """Remove and unlock it, when all of it is in MLflow."""
        # The records first: what a killed process leaves of the folder then holds nothing that would be sent again, and
        # the next journal of this run forgets its `steps_before`.
        (self.folder / RECORDS).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.release()

    def _note(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "metrics":
            self._highest |= dict.fromkeys(record["values"], record["step"])
        elif record["kind"] in ("start", "end"):
            self.has_ended = record["kind"] == "end"


def journals(home: Path) -> list[Path]:
    """The folders of all journals in a folder mlruns, the oldest first."""
    ages: dict[Path, int] = {}
    for folder in (home / FOLDER).glob("*"):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # another process removes what it has sent
            (folder / RECORDS).stat()
            ages[folder] = folder.stat().st_ctime_ns
    return sorted(ages, key=lambda folder: ages[folder])


def empty_folders(home: Path) -> list[Path]:
    """The folders that hold no records, of processes that died while they created or removed them."""
    folders = [path for path in (home / FOLDER).glob("*") if path.is_dir()]  # a file there is a person's
    return [path for path in folders if not (path / RECORDS).exists() and not is_busy(path)]


def address_of(folder: Path) -> str | None:
    """The tracker that a journal was made for, by its first record; None where that is damaged."""
    try:
        with (folder / RECORDS).open("rb") as file:
            return str(json.loads(file.readline())["address"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_busy(folder: Path) -> bool:
    """Whether a living process writes or sends it."""
    try:
        file = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def _lock(folder: Path, timeout_s: float) -> int:
    """The locked lock file of an existing folder.

    The process that sent the journal removes the folder while it holds the lock. So a lock counts only on the file that
    still has the lock's path; on a removed one it would keep nobody out, and a new folder is created.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        with _as_disk_fault(folder):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # it was sent and removed meanwhile
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, folder / _LOCK):
                return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(file)
                raise Busy(folder.name) from None
            time.sleep(0.1)
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False


@contextlib.contextmanager
def _as_disk_fault(folder: Path) -> Iterator[None]:
    """Turn what the operating system refuses into one line."""
    try:
        yield
    except OSError as error:
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror
        remedy = "free space on this disk, or repair it; what was measured is kept, and the same command resumes"
        raise DiskFault(str(folder), f"can't be written ({reason})", remedy) from None


def _write(file: int, content: bytes) -> None:
    """Write all of it: a disk that becomes full takes a part, and refuses the rest."""
    while content:
        content = content[os.write(file, content) :]


def _end_of_last_complete_line(path: Path) -> int:
    return path.read_bytes().rfind(b"\n") + 1


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
