"""The ledger is append-only, and of two changes at once one wins."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import PromotionRefused, UserError
from pipeline.registry.gate import GateRecord
from pipeline.registry.ledger import FILE, PROMOTED, ROLLED_BACK, TEST_EVALUATION, UNDONE, Champion, Event, Ledger
from registry.helpers import record


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "mlruns")


def promoted(ledger: Ledger, version: str, kind: str = PROMOTED) -> Event:
    over = (ledger.champions("m") or [None])[-1]
    begun = ledger.begin(kind, "m", f"run {version}", over, previous=over.version if over else None, reason="why")
    return ledger.end(begun, kind, version)


def test_event_has_user_time_reason_and_is_kept(ledger: Ledger) -> None:
    written = ledger.record(TEST_EVALUATION, "m", "run", split="abc", reason="may it?", details={"from": "images"})
    (read,) = Ledger(ledger.home).events()
    assert read == written
    assert read.user and read.host and read.time.endswith("+00:00") and read.details == {"from": "images"}
    assert Ledger(ledger.home).events("other") == []


def test_events_cannot_be_changed_or_removed(ledger: Ledger) -> None:
    ledger.record(TEST_EVALUATION, "m", "run")
    for statement in ("UPDATE events SET run = 'x'", "DELETE FROM events"):
        with (
            sqlite3.connect(ledger.home / FILE) as connection,
            pytest.raises(sqlite3.IntegrityError, match="append-only"),
        ):
            connection.execute(statement)
    assert [event.run for event in ledger.events()] == ["run"]


def test_rollback_removes_the_champions_after_its_target(ledger: Ledger) -> None:
    for version in ("1", "2", "3"):
        promoted(ledger, version)
    assert [champion.version for champion in ledger.champions("m")] == ["1", "2", "3"]
    promoted(ledger, "1", ROLLED_BACK)
    assert ledger.champions("m") == [Champion("1", "run 1")]
    promoted(ledger, "3")
    promoted(ledger, "2", ROLLED_BACK)  # to one that is no more among those before
    assert [champion.version for champion in ledger.champions("m")] == ["1", "3", "2"]
    promoted(ledger, "1")
    promoted(ledger, "4")
    promoted(ledger, "1", ROLLED_BACK)  # which served twice
    assert [champion.version for champion in ledger.champions("m")] == ["1", "3", "2", "1"]


def test_one_change_at_a_time_and_from_the_known_champion(ledger: Ledger) -> None:
    begun = ledger.begin(PROMOTED, "m", "run", None, previous=None)
    assert ledger.unfinished() == [begun]
    with pytest.raises(PromotionRefused, match=r"m: a promotion by .* is under way"):
        ledger.begin(PROMOTED, "m", "other", None, previous=None)
    ledger.begin(PROMOTED, "another model", "other", None, previous=None)
    ledger.end(begun, PROMOTED, "1")
    with pytest.raises(PromotionRefused, match=r"its champion changed meanwhile \(version 1, run run\)"):
        ledger.begin(PROMOTED, "m", "other", None, previous=None)
    with pytest.raises(PromotionRefused, match="was ended by another command"):
        ledger.end(begun, UNDONE, None)


def test_of_many_concurrent_changes_one_wins(ledger: Ledger) -> None:
    def attempt(number: int) -> bool:
        try:
            Ledger(ledger.home).begin(PROMOTED, "m", str(number), None, previous=None)
        except PromotionRefused:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(16))) == 1
    assert len(ledger.events()) == 1


def test_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("no database, but long enough to look like one" * 50)
    with pytest.raises(UserError, match="can't be used as the ledger"):
        Ledger(tmp_path)


def test_verdict_of_before_comparisons_were_counted_is_read() -> None:
    """It says how many models were compared, which is at least as low."""
    details = record(comparison=3)
    former = {"models" if name == "comparison" else name: value for name, value in details.items()}
    assert GateRecord.model_validate(former) == GateRecord.model_validate(details)
