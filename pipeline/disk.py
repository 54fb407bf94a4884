"""Files on disk: written whole or not at all, and told apart by their content."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".*.[0-9]*.new"  # the names of what `replacing` writes, as a pattern


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside `path`, for the body to write: at its end it takes the place of `path`, after an error it is gone.

    So a reader, and a disk that fills up, see the old file or the whole new one. OSError where there is no such folder.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield new
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits; OSError where it can't be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_new(database: str | None, default: Path) -> bool:
    """Whether the database of this address, or else `default`, is an SQLite file that doesn't exist yet."""
    path = str(default) if database is None else database.removeprefix("sqlite:///")
    return "://" not in path and not Path(path).exists()
