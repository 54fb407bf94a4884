"""A folder mlruns that was moved: MLflow keeps absolute paths in its database, which are rewritten."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from pipeline.errors import UserError
from pipeline.tracking.journal import is_busy, journals

DATABASE = "mlflow.db"
# All columns of MLflow 3.17 that can hold a location of files (a test searches for others).
_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def check_place(home: Path) -> None:
    """UserError where the folder was moved: MLflow would write files to the old place, and find none."""
    with _connected(home) as connection:
        old = _old_homes(connection, home)
    if old:
        rule = f"was moved here from {_path(old[0])}, where MLflow still looks for its files"
        raise UserError(str(home.resolve()), rule, "`relocate` writes the new place into its database")


def relocate(home: Path) -> dict[str, int]:
    """Write this place into the default store wherever it names the old one; old place -> how many entries.

    Paths outside the old folder stay. UserError where there is no store here, or a command still runs on it.
    """
    if not (home / DATABASE).is_file():
        raise UserError(str(home.resolve()), f"has no {DATABASE}", "run this in the folder that contains mlruns")
    if any(is_busy(folder) for folder in journals(home)):
        raise UserError(str(home.resolve()), "another command is writing runs here", "wait for it, or stop it")
    with FileLock(home / "mlflow.lock"), _connected(home) as connection:
        connection.execute("BEGIN IMMEDIATE")
        counts = {old: _rewrite(connection, old, home.resolve().as_uri()) for old in _old_homes(connection, home)}
        connection.execute("COMMIT")
    return {str(_path(old)): count for old, count in counts.items()}


def _rewrite(connection: sqlite3.Connection, old: str, new: str) -> int:
    """Every place below an old home, an address or a plain path, moved below the new one; how many."""
    prefixes = {f"{old}/": f"{new}/", f"{_path(old)}/": f"{_path(new)}/"}
    return sum(
        connection.execute(
            f"UPDATE {table} SET {column} = :new || substr({column}, length(:old) + 1) "
            f"WHERE substr({column}, 1, length(:old)) = :old",
            {"old": before, "new": after},
        ).rowcount
        for table, column in _COLUMNS
        for before, after in prefixes.items()
    )


def _old_homes(connection: sqlite3.Connection, home: Path) -> list[str]:
    """The addresses of other folders mlruns that experiments name; ours have their files in `artifacts` there."""
    rows = connection.execute(
        "SELECT DISTINCT artifact_location FROM experiments WHERE artifact_location LIKE 'file:///%/artifacts'"
    )
    homes = [location.removesuffix("/artifacts") for (location,) in rows]
    return sorted(old for old in homes if _path(old) != home.resolve())


def _path(address: str) -> Path:
    return Path(unquote(urlsplit(address).path))


@contextlib.contextmanager
def _connected(home: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(home / DATABASE, timeout=30, isolation_level=None)) as connection:
        yield connection
