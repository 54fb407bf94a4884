"""One command at a time for a study."""

import contextlib
import hashlib
import time
from pathlib import Path
from typing import Self

from optuna.storages import RDBStorage
from sqlalchemy import Connection, NullPool, create_engine, text
from sqlalchemy.exc import DBAPIError

from pipeline.errors import UserError
from pipeline.processes import PROBE_S, study_lock


class StudyLock:
    """A study's lock: a file in the folder mlruns, and on PostgreSQL one for all machines, held while the connection lives.

    Entering the block raises UserError where another command holds it.
    """

    def __init__(self, storage: RDBStorage, home: Path, key: str):
        self._key, self._home = key, home
        self._number = int.from_bytes(hashlib.sha256(f"pipeline {key}".encode()).digest()[:8], "big", signed=True)
        self._engine = create_engine(storage.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        self._connection: Connection | None = None
        self._file = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as file:
            file.enter_context(study_lock(self._key, self._home))
            if self._engine.dialect.name == "postgresql":
                self._connection = self._acquire()
            self._file = file.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._disconnect()
        self._file.close()

    def check(self) -> None:
        """Acquire the database's lock again where the connection was lost; UserError where another command was faster."""
        if self._engine.dialect.name != "postgresql":
            return
        try:
            if self._connection:
                self._connection.execute(text("SELECT 1"))
            else:
                self._connection = self._acquire()
        except DBAPIError:  # the database is away; it may be back at the next check
            self._disconnect()

    def _disconnect(self) -> None:
        if self._connection:
            with contextlib.suppress(DBAPIError):
                self._connection.close()
            self._connection = None

    def _acquire(self) -> Connection:
        connection = self._engine.connect()
        query, deadline = text("SELECT pg_try_advisory_lock(:number)"), time.monotonic() + PROBE_S
        while not connection.execute(query, {"number": self._number}).scalar():
            if time.monotonic() > deadline:
                connection.close()
                raise UserError(
                    f"study {self._key}",
                    "another command is running it, maybe on another machine",
                    "wait for it, or stop it",
                )
            time.sleep(0.05)
        return connection
