"""The ledger: every test evaluation, every verdict, every change of champion; appended, never changed.

MLflow's alias is one write without history, and the last writer wins. So what may happen is decided here, by comparing and
setting in one transaction, and the alias follows. A change of champion is two events: `begun` before its first effect, and
`promoted`, `rolled back` or `undone` after its last; a change that is begun and not ended was interrupted, and is repaired.
"""

import contextlib
import getpass
import json
import socket
import sqlite3
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline.errors import PromotionRefused, UserError
from pipeline.registry.gate import GateRecord
from pipeline.tracking.models import command_about

FILE = "ledger.db"
TEST_EVALUATION, PASSED, REFUSED = "test evaluation", "passed", "refused"
BEGUN, PROMOTED, ROLLED_BACK, UNDONE = "begun", "promoted", "rolled back", "undone"
DELETED = "deleted"  # in MLflow, which can't restore a version: it can't be champion again
CHANGES = (PROMOTED, ROLLED_BACK)

_TABLE = """
CREATE TABLE IF NOT EXISTS events (
  id INTEGER PRIMARY KEY AUTOINCREMENT, time TEXT NOT NULL, user TEXT NOT NULL, host TEXT NOT NULL, kind TEXT NOT NULL,
  model TEXT NOT NULL, run TEXT NOT NULL, version TEXT, split TEXT, reason TEXT NOT NULL, details TEXT NOT NULL
)"""
_APPEND_ONLY = """
CREATE TRIGGER IF NOT EXISTS no_{0} BEFORE {0} ON events BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"""


@dataclass(frozen=True)
class Event:
    """One line of the ledger."""

    id: int
    time: str  # UTC, ISO 8601, to the second
    user: str
    host: str
    kind: str
    model: str  # the registered model's name
    run: str  # MLflow's id
    version: str | None  # of the registered model
    split: str | None  # the test split's digest
    reason: str
    details: dict[str, Any]  # JSON; of a verdict a GateRecord

    @property
    def evidence(self) -> "VerdictEvidence":
        """What goes with the model; of a verdict."""
        assert self.kind in (PASSED, REFUSED), self.kind
        return VerdictEvidence(
            run=self.run,
            decided=self.time,
            user=self.user,
            test_split=self.split or "",
            reason=self.reason,
            record=GateRecord.model_validate(self.details),
        )


class VerdictEvidence(BaseModel):
    """A verdict of the ledger outside of it: in its run's artifacts and in the packaged model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    decided: str  # UTC, ISO 8601, to the second
    user: str
    test_split: str  # its digest
    reason: str
    record: GateRecord


_COLUMNS = tuple(field.name for field in fields(Event))


@dataclass(frozen=True)
class Champion:
    """A version that serves, or served, and the run that it is of."""

    version: str
    run: str


class Ledger:
    """The ledger of a folder mlruns, in an SQLite file of its own. UserError where the file can't be used."""

    def __init__(self, home: Path):
        self.home = home
        try:
            home.mkdir(parents=True, exist_ok=True)
            with self._transaction() as connection:
                connection.execute(_TABLE)
                for action in ("UPDATE", "DELETE"):
                    connection.execute(_APPEND_ONLY.format(action))
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                str(home / FILE), f"can't be used as the ledger ({error})", "move it away, or repair it"
            ) from None

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One writer at a time, and on disk when the block is left."""
        connection = sqlite3.connect(self.home / FILE, timeout=30, isolation_level=None)
        try:
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        finally:
            connection.close()  # which rolls back what wasn't committed

    def record(
        self,
        kind: str,
        model: str,
        run: str,
        *,
        version: str | None = None,
        split: str | None = None,
        reason: str = "",
        details: dict[str, Any] | None = None,
    ) -> Event:
        """Append a test evaluation, a verdict, or that a version that was champion is no longer in the registry."""
        assert kind in (TEST_EVALUATION, PASSED, REFUSED, DELETED), kind
        with self._transaction() as connection:
            return _append(connection, kind, model, run, version, split, reason, details or {})

    def begin(
        self,
        kind: str,
        model: str,
        run: str,
        over: Champion | None,
        *,
        previous: str | None,
        version: str | None = None,
        reason: str = "",
    ) -> Event:
        """Begin a change of champion of `kind`, from the one that the caller saw.

        `version` is known where it is there already; `previous` is the version that the alias `previous` will name.
        PromotionRefused where another one is champion by now, or another change is begun: of two at once, one wins. The
        event's details hold a token that finds the version it made.
        """
        assert kind in (PROMOTED, ROLLED_BACK), kind
        details = {
            "kind": kind,
            "token": uuid.uuid4().hex,
            "over": over.version if over else None,
            "previous": previous,
        }
        with self._transaction() as connection:
            events = _read(connection, model)
            if other := _unfinished(events):
                raise PromotionRefused(model, f"{_describe(other)} is under way", "wait for it, and try again")
            champions = _champions(events)
            current = champions[-1] if champions else None
            if current != over:
                named = f"version {current.version}, run {current.run}" if current else "none"
                rule = f"its champion changed meanwhile ({named})"
                raise PromotionRefused(model, rule, "`--force` with `--reason` compares with that one")
            return _append(connection, BEGUN, model, run, version, None, reason, details)

    def end(self, begun: Event, kind: str, version: str | None, reason: str = "") -> Event:
        """Close what `begin` opened. PromotionRefused where another command has closed it."""
        assert kind in (PROMOTED, ROLLED_BACK, UNDONE), kind
        with self._transaction() as connection:
            unfinished = _unfinished(_read(connection, begun.model))
            if unfinished is None or unfinished.id != begun.id:
                rule = f"{_describe(begun)} was ended by another command"
                raise PromotionRefused(begun.model, rule, f"`{command_about(begun.model, 'history')}` shows it")
            details = {"begun": begun.id, "over": begun.details["over"]}
            return _append(connection, kind, begun.model, begun.run, version, None, reason or begun.reason, details)

    def events(self, model: str | None = None) -> list[Event]:
        """All, or those of one registered model, the oldest first."""
        with self._transaction() as connection:
            return _read(connection, model)

    def champions(self, model: str) -> list[Champion]:
        """The champion last, before it those that a rollback goes back to; a rollback removes those after its target.

        Versions that were deleted in MLflow are left out.
        """
        return _champions(self.events(model))

    def models(self) -> list[str]:
        """The registered models that there are events of."""
        return sorted({event.model for event in self.events()})

    def unfinished(self) -> list[Event]:
        """What was begun and not ended, of all models."""
        events = self.events()
        last = (_unfinished([e for e in events if e.model == model]) for model in self.models())
        return [event for event in last if event]


def _append(
    connection: sqlite3.Connection,
    kind: str,
    model: str,
    run: str,
    version: str | None,
    split: str | None,
    reason: str,
    details: dict[str, Any],
) -> Event:
    time = datetime.now(UTC).isoformat(timespec="seconds")
    row = (time, getpass.getuser(), socket.gethostname(), kind, model, run, version, split, reason)
    id = connection.execute(
        "INSERT INTO events (time, user, host, kind, model, run, version, split, reason, details) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*row, json.dumps(details)),
    ).lastrowid
    assert id is not None
    return Event(id, *row, details)


def _read(connection: sqlite3.Connection, model: str | None) -> list[Event]:
    rows = connection.execute(
        f"SELECT {', '.join(_COLUMNS)} FROM events WHERE :model IS NULL OR model = :model ORDER BY id",
        {"model": model},
    )
    return [Event(**dict(zip(_COLUMNS, row, strict=True)) | {"details": json.loads(row[-1])}) for row in rows]


def _unfinished(events: list[Event]) -> Event | None:
    """Of one model: there is at most one."""
    last = None
    for event in events:
        if event.kind == BEGUN:
            last = event
        elif event.kind in (PROMOTED, ROLLED_BACK, UNDONE):
            last = None
    return last


def _champions(events: list[Event]) -> list[Champion]:
    stack: list[Champion] = []
    for event in events:
        if event.kind in (PROMOTED, ROLLED_BACK):
            assert event.version is not None
            champion = Champion(event.version, event.run)
            stack = [*(before(stack, champion) if event.kind == ROLLED_BACK else stack), champion]
        elif event.kind == DELETED:
            stack = [champion for champion in stack if champion != Champion(event.version or "", event.run)]
    return stack


def before(champions: list[Champion], target: Champion) -> list[Champion]:
    """Those that served before `target` did last; all where it is none of them."""
    places = [place for place, champion in enumerate(champions) if champion == target]
    return champions[: places[-1]] if places else champions


def _describe(begun: Event) -> str:
    change = "a rollback" if begun.details["kind"] == ROLLED_BACK else "a promotion"
    return f"{change} by {begun.user} on {begun.host}, begun {begun.time}"
