"""How this process uses SQLite databases, MLflow's and Optuna's alike."""

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event, text


def use_write_ahead_log(engine: Engine) -> None:
    """Set the write-ahead log of an SQLite database, which its file keeps; nothing for other databases.

    It halves small writes, and readers don't block the writer.
    """
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:
            connection.execute(text("PRAGMA journal_mode=WAL"))


def database_fault(file: Path) -> str:
    """What is broken in an SQLite file; empty where it is intact. https://sqlite.org/pragma.html#pragma_quick_check"""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{file.resolve()}?mode=ro", uri=True, timeout=30)) as connection:
            (result,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            return "" if result == "ok" else str(result)
    except sqlite3.Error as error:
        return str(error)


def checkpoint(path: Path) -> None:
    """Move what is in a database's write-ahead log into the database, as far as no reader needs the log."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


@event.listens_for(Engine, "connect")
def _commit_without_waiting_for_the_disk(connection: Any, record: Any) -> None:
    """What was committed survives the death of the process; a power failure may take its last seconds, and never more.

    With a write-ahead log the database stays intact. A trial has some 40 commits, each of which would wait 5 to 20 ms for
    the disk. https://sqlite.org/pragma.html#pragma_synchronous
    """
    if type(connection).__module__.startswith("sqlite3"):
        connection.execute("PRAGMA synchronous=NORMAL")
