"""What the audit finds, and what it mends: a whole store, and each thing that can be wrong with it."""

import contextlib
import json
import shutil
import socket
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Trained, registered
from filelock import FileLock

from pipeline.audit import Audit, audit, check_databases, mend
from pipeline.data.prepare import TrainingData
from pipeline.recipe import Recipe
from pipeline.registry import ledger
from pipeline.registry.package import Package
from pipeline.search import run_study
from pipeline.search.storage import open_storage
from pipeline.search.study import Search, Study
from pipeline.search.trial import StudyContext
from pipeline.tracking.journal import FOLDER, RECORDS, Journal
from pipeline.tracking.tracker import MlflowTracker
from pipeline.training.checkpoints import save_folder

GONE = json.dumps({"host": socket.gethostname(), "pid": 2**22 - 1, "started": 1.0})


class Anybody:
    def __getattr__(self, name: str) -> Any:
        return lambda *what: None


@pytest.fixture(scope="module")
def whole(small_recipe: Recipe, digits: TrainingData, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A study of two trials, of two epochs each."""
    home = tmp_path_factory.mktemp("whole") / "mlruns"

    def rates(trial: Any) -> None:
        trial.suggest_float("optimizer.lr", 1e-3, 1, log=True)

    study = Study(question="?", base=small_recipe, space=rates, objective="val/accuracy", trials=2)
    search, tracker = Search("tiny", study, {}, 1, 2, None), MlflowTracker(home)
    context = StudyContext(
        search=search,
        data=digits,
        device=torch.device("cpu"),
        storage=open_storage(home),
        tracker=tracker,
        observer=Anybody(),
    )
    run_study.run_study(context)
    assert tracker.flush(60)
    return Trained(home, "", "")


@pytest.fixture
def home(whole: Trained, tmp_path: Path) -> Path:
    """A copy of it."""
    whole.copy(tmp_path / "mlruns")
    return tmp_path / "mlruns"


def change(home: Path, database: str, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(home / database)) as connection:
        for statement in statements:
            assert connection.execute(statement).rowcount > 0, statement
        connection.commit()


def look(home: Path) -> Audit:
    return audit(home, open_storage(home), MlflowTracker(home))


def fix(home: Path) -> list[str]:
    return mend(home, open_storage(home), MlflowTracker(home))


def key_of(home: Path, trial: int) -> str:
    with contextlib.closing(sqlite3.connect(home / "mlflow.db")) as connection:
        query = "SELECT value FROM tags WHERE key = 'run_key' AND run_uuid = "
        query += "(SELECT run_uuid FROM tags WHERE key = 'trial' AND value = ?)"
        return str(connection.execute(query, (str(trial),)).fetchone()[0])


def test_of_a_whole_store_nothing_is_said(home: Path) -> None:
    seen = look(home)
    assert (seen.studies, seen.trials, seen.runs, seen.findings, seen.unchecked) == (1, 2, 2, [], [])
    assert fix(home) == []
    assert check_databases(home) == []


def test_what_was_made_before_there_were_run_keys_is_named_and_not_called_lost(home: Path) -> None:
    change(home, "optuna.db", "DELETE FROM trial_user_attributes WHERE key = 'run_key'")
    change(home, "mlflow.db", "DELETE FROM tags WHERE key = 'run_key'")
    seen = look(home)
    assert seen.findings == []
    assert "tiny-v1-digits: 2 trials from before there were run keys, which tie trials to their runs" in seen.unchecked


RUN = "(SELECT run_uuid FROM tags WHERE key = 'trial' AND value = '1')"
ATTRIBUTE = "trial_user_attributes(trial_id, key, value_json)"
FAULTS = {
    "a run is gone": (
        ("mlflow.db", f"DELETE FROM runs WHERE run_uuid = {RUN}"),
        ["trial 1 of tiny-v1-digits: should have one run in MLflow, and has 0"],
    ),
    "a trial has two runs": (
        ("mlflow.db", f"UPDATE tags SET value = (SELECT value FROM tags WHERE run_uuid = {RUN} AND key = 'run_key') "
            "WHERE key = 'run_key' AND run_uuid IN (SELECT run_uuid FROM tags WHERE key = 'trial')"),
        ["trial 0 of tiny-v1-digits: should have one run in MLflow, and has 0",
            "trial 1 of tiny-v1-digits: should have one run in MLflow, and has 2"],
    ),
    "a run has no trial": (
        ("optuna.db", "UPDATE trial_user_attributes SET value_json = '\"ab\"' WHERE key = 'run_key' AND trial_id = 2"),
        ["trial 1 of tiny-v1-digits: should have one run in MLflow, and has 0",
            "no trial of tiny-v1-digits has its run key"],
    ),
    "two trials have one run": (
        ("optuna.db", "UPDATE trial_user_attributes SET value_json = (SELECT value_json FROM trial_user_attributes "
            "WHERE key = 'run_key' AND trial_id = 1) WHERE key = 'run_key'"),
        ["2 trials that count have run key", "trial 1 of tiny-v1-digits: finished in Optuna, its run",
            "trial 1 of tiny-v1-digits: val/accuracy 0.", "no trial of tiny-v1-digits has its run key"],
    ),
    "a point is lost": (
        ("mlflow.db", f"DELETE FROM metrics WHERE key = 'val/loss' AND step = 1 AND run_uuid = {RUN}"),
        ["val/loss has 1 from epoch 2 to 2, and should have 2 from 1 to 2"],
    ),
    "the last epoch is lost": (
        ("mlflow.db", f"DELETE FROM metrics WHERE step = 2 AND run_uuid = {RUN}"),
        ["trial 1 of tiny-v1-digits: trained 2 epochs, its run", "finished 2 epochs, and has points of 1"],
    ),
    "a point is doubled": (
        ("mlflow.db", "INSERT INTO metrics (key, value, timestamp, step, is_nan, run_uuid) "
            "SELECT key, value, timestamp + 1, step, is_nan, run_uuid FROM metrics "
            f"WHERE key = 'val/loss' AND step = 1 AND run_uuid = {RUN}"),
        ["val/loss has 3 points for 2 epochs"],
    ),
    "another score": (
        ("optuna.db", "UPDATE trial_values SET value = value + 1e-9 WHERE trial_id = 2"),
        ["trial 1 of tiny-v1-digits: val/accuracy 0."],
    ),
    "another state": (
        ("mlflow.db", f"UPDATE tags SET value = 'pruned' WHERE key = 'state' AND run_uuid = {RUN}"),
        ["trial 1 of tiny-v1-digits: finished in Optuna, its run"],
    ),
    "asked again by nobody": (
        ("optuna.db", f"INSERT INTO {ATTRIBUTE} VALUES (2, 'requeued', 'true')"),
        ["trial 1 of tiny-v1-digits: asked again, and 0 trials take its place"],
    ),
    "a second parent": (
        ("optuna.db", "UPDATE study_user_attributes SET value_json = '\"ab\"' WHERE key = 'mlflow_run_id'"),
        ["a second parent run of its study", *["should have one run in MLflow, and has 0"] * 2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_told_and_what_would_be_a_guess_is_not_mended(fault: str, home: Path) -> None:
    (database, *statements), expected = FAULTS[fault]
    change(home, database, *statements)
    seen = look(home).findings
    assert len(seen) == len(expected), seen
    for words in expected:
        assert any(words in line for line in seen), (words, seen)
    fix(home)
    assert look(home).findings == seen


def test_what_a_dead_process_left_running_is_told_and_mended(home: Path) -> None:
    change(home, "mlflow.db", f"UPDATE runs SET status = 'RUNNING', end_time = NULL WHERE run_uuid = {RUN}")
    change(
        home,
        "optuna.db",
        "UPDATE trials SET state = 'RUNNING' WHERE trial_id = 2",
        f"UPDATE trial_user_attributes SET value_json = '{GONE}' WHERE key = 'worker' AND trial_id = 2",
    )
    seen = look(home).findings
    assert len(seen) == 2, seen
    assert "(run " in seen[0] and "RUNNING in MLflow, and its process is gone; make audit FIX=1 closes it" in seen[0]
    assert seen[1].startswith(
        "trial 1 of tiny-v1-digits: RUNNING, and its process is gone; make audit FIX=1 asks it again"
    )
    assert fix(home)[0] == "trial 1 of tiny-v1-digits: its process was gone; it is asked again"
    assert look(home).findings == []
    assert [trial.state.name for trial in open_storage(home).get_all_trials(1)] == ["COMPLETE", "FAIL", "WAITING"]


def test_a_study_that_is_being_run_is_judged_by_what_has_ended(home: Path) -> None:
    change(home, "mlflow.db", f"UPDATE runs SET status = 'RUNNING' WHERE run_uuid = {RUN}")
    change(home, "optuna.db", "UPDATE trials SET state = 'RUNNING' WHERE trial_id = 2")
    with FileLock(home / "tiny-v1-digits.lock"):
        seen = look(home)
        assert not seen.findings
        assert seen.unchecked == ["tiny-v1-digits: is being run; only what has ended was looked at"]
        assert fix(home) == []
    assert len(look(home).findings) == 1, "the run; of the trial, its worker lives: this process"


def test_a_flipped_bit_in_a_models_weights_is_found(home: Path) -> None:
    for file in home.glob("artifacts/*/artifacts/weights.safetensors"):
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    seen = look(home).findings
    assert len(seen) == 2 and all("damaged, its digest differs; make reproduce makes it again" in line for line in seen)


def test_a_changed_file_of_a_registered_model_is_found(trained: Trained, packed: Package, tmp_path: Path) -> None:
    trained.copy(tmp_path / "mlruns")
    home, folder = tmp_path / "mlruns", tmp_path / "packed"
    shutil.copytree(packed.folder, folder)
    with registered(Trained(home, trained.finished, ""), Package(folder, packed.sha256, "", 0, 0.0, None)):
        assert not audit(home, None, MlflowTracker(home)).findings
        (folder / "card.md").write_text("the best")
        (seen,) = audit(home, None, MlflowTracker(home)).findings
        assert "image-classifier version 1: card.md: its SHA-256 differs" in seen


def test_a_promotion_that_was_cut_off_and_an_alias_that_was_moved_are_found(trained: Trained, tmp_path: Path) -> None:
    trained.copy(tmp_path / "mlruns")
    home = tmp_path / "mlruns"
    kept = ledger.Ledger(home)
    begun = kept.begin(ledger.PROMOTED, "image-classifier", trained.finished, None, previous=None, version="1")
    (seen,) = audit(home, None, MlflowTracker(home)).findings
    assert "was cut off; make history finishes or undoes it" in seen
    kept.end(begun, ledger.PROMOTED, "1")
    (seen,) = audit(home, None, MlflowTracker(home)).findings
    assert "version 1 was deleted in MLflow; make audit FIX=1 takes it out of the reigns" in seen


def test_what_killed_processes_left_on_disk_is_found_and_mended_and_no_measurement_goes(home: Path) -> None:
    key = key_of(home, 1)
    save_folder(home / "checkpoints" / key / "epoch-000001", {"state.safetensors": b"x"}, {})
    (home / FOLDER / ("a" * 32)).mkdir(parents=True)
    journal = Journal(home / FOLDER / key)
    journal.append({"kind": "start", "address": "mlflow.db", "time": 1, "name": "trial 1", "tags": {}, "params": {},
        "experiment": "tiny-v1-digits"}, durable=True)  # fmt: skip
    journal.append({"kind": "metrics", "step": 2, "time": 1, "values": {"val/new": 1.0}}, durable=True)
    journal.append({"kind": "end", "status": "FINISHED", "time": 2, "tags": {"state": "finished"}}, durable=True)
    journal.release()
    seen = look(home).findings
    expected = ["not in MLflow yet", "the state of a training that has ended", "left by a command that was killed"]
    assert len(seen) == 3 and all(any(words in line for line in seen) for words in expected), seen
    done = fix(home)
    assert any("1 journals of processes that are gone: sent to MLflow" in line for line in done), done
    assert look(home).findings == []
    with contextlib.closing(sqlite3.connect(home / "mlflow.db")) as connection:
        assert connection.execute("SELECT value FROM metrics WHERE key = 'val/new'").fetchall() == [(1.0,)]


def test_a_journal_that_a_living_process_writes_is_its_own(home: Path) -> None:
    journal = Journal(home / FOLDER / key_of(home, 1))
    journal.append({"kind": "start", "address": "mlflow.db"})
    assert not look(home).findings
    assert not fix(home)
    assert (journal.folder / RECORDS).exists()
    journal.release()


def test_a_broken_database_is_told_before_anything_is_asked_of_it(home: Path) -> None:
    content = bytearray((home / "optuna.db").read_bytes())
    content[4096 * 3 : 4096 * 6] = b"\xaa" * 4096 * 3
    (home / "optuna.db").write_bytes(content)
    (seen,) = check_databases(home)
    assert "optuna.db: broken (" in seen
