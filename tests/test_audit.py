"""What the audit finds and repairs: an intact store, and each fault that it can have."""

import contextlib
import json
import os
import shutil
import socket
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Trained, registered
from filelock import FileLock

from pipeline.audit import Audit, audit, check_databases, repair
from pipeline.data.prepare import TrainingData
from pipeline.errors import Problem
from pipeline.recipe import Recipe
from pipeline.registry import ledger, promote
from pipeline.registry.package import Package
from pipeline.search import run_study
from pipeline.search.search import Search
from pipeline.search.storage import open_storage
from pipeline.search.study import Study
from pipeline.search.trial import StudyContext
from pipeline.tracking.journal import FOLDER, RECORDS, Journal
from pipeline.tracking.queries import all_runs
from pipeline.tracking.tracker import MlflowTracker
from pipeline.training.checkpoints import save_folder

GONE = json.dumps({"host": socket.gethostname(), "pid": 2**22 - 1, "started": 1.0})


class SilentObserver:
    def __getattr__(self, name: str) -> Any:
        return lambda *what: None


@pytest.fixture(scope="module")
def intact_store(small_recipe: Recipe, digits: TrainingData, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A study of two trials, of two epochs each."""
    home = tmp_path_factory.mktemp("intact") / "mlruns"

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
        observer=SilentObserver(),
    )
    run_study.run_study(context)
    assert tracker.flush(60)
    return Trained(home, "", "")


@pytest.fixture
def home(intact_store: Trained, tmp_path: Path) -> Path:
    """A copy of it."""
    intact_store.copy(tmp_path / "mlruns")
    return tmp_path / "mlruns"


def change(home: Path, database: str, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(home / database)) as connection:
        for statement in statements:
            assert connection.execute(statement).rowcount > 0, statement
        connection.commit()


def check(home: Path) -> Audit:
    return audit(open_storage(home), MlflowTracker(home))


def findings(home: Path) -> list[str]:
    return all_lines(check(home).findings)


def all_lines(problems: list[Problem]) -> list[str]:
    return [line for problem in problems for line in problem.lines]


def fix(home: Path) -> list[str]:
    return repair(open_storage(home), MlflowTracker(home))


def key_of(home: Path, trial: int) -> str:
    with contextlib.closing(sqlite3.connect(home / "mlflow.db")) as connection:
        query = "SELECT value FROM tags WHERE key = 'run_key' AND run_uuid = "
        query += "(SELECT run_uuid FROM tags WHERE key = 'trial' AND value = ?)"
        return str(connection.execute(query, (str(trial),)).fetchone()[0])


def test_intact_store_has_no_findings(home: Path) -> None:
    seen = check(home)
    assert (seen.studies, seen.trials, seen.runs, seen.findings, seen.unchecked) == (1, 2, 2, [], [])
    assert fix(home) == []
    assert check_databases(home) == []


def test_deleted_duplicate_of_a_run_is_not_the_run(home: Path) -> None:
    tracker = MlflowTracker(home)
    [run] = [run for run in all_runs(tracker) if run.data.tags.get("trial") == "1"]
    tracker.client.delete_run(tracker.client.create_run(run.info.experiment_id, tags=run.data.tags).info.run_id)
    seen = check(home)
    assert (seen.findings, seen.omitted) == ([], [])


def test_f1_of_classes_at_the_end_only_is_no_fault(home: Path) -> None:
    """As of many classes, or by an older version of this project, next to runs that have it at each epoch."""
    change(home, "mlflow.db", f"DELETE FROM metrics WHERE key LIKE 'val/f1/%' AND step = 1 AND run_uuid = {RUN}")
    assert findings(home) == []


def test_trials_without_run_keys_are_unchecked_and_not_lost(home: Path) -> None:
    change(home, "optuna.db", "DELETE FROM trial_user_attributes WHERE key = 'run_key'")
    change(home, "mlflow.db", f"DELETE FROM tags WHERE key = 'run_key' AND run_uuid IN ({TRIALS})")
    seen = check(home)
    assert seen.findings == []
    assert "tiny-v1-digits: 2 trials have no run key, which ties a trial to its run" in all_lines(seen.unchecked)


TRIALS = "SELECT run_uuid FROM tags WHERE key = 'trial'"
RUN = "(SELECT run_uuid FROM tags WHERE key = 'trial' AND value = '1')"
RUNNING = f"UPDATE runs SET status = 'RUNNING', end_time = NULL WHERE run_uuid = {RUN}"
OF_A_DEAD_PROCESS = f"UPDATE tags SET value = '{GONE}' WHERE key = 'worker' AND run_uuid = {RUN}"
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
            "WHERE key = 'run_key' AND trial_id = 1) WHERE key = 'run_key'",
            "UPDATE trial_values SET value = value + 1e-9 WHERE trial_id = 2"),  # both trials may score the same
        ["2 trials that count have run key", "trial 1 of tiny-v1-digits: is finished in Optuna; its run",
            "trial 1 of tiny-v1-digits: has val/accuracy 0.", "no trial of tiny-v1-digits has its run key"],
    ),
    "a point is lost": (
        ("mlflow.db", f"DELETE FROM metrics WHERE key = 'val/loss' AND step = 1 AND run_uuid = {RUN}"),
        ["val/loss has 1 from epoch 2 to 2, and should have 2 from 1 to 2"],
    ),
    "a point of a class is lost": (
        ("mlflow.db", f"DELETE FROM metrics WHERE key = 'val/f1/7' AND step = 1 AND run_uuid = {RUN}"),
        ["val/f1/7 has 1 from epoch 2 to 2, and should have 2 from 1 to 2"],
    ),
    "the last epoch is lost": (
        ("mlflow.db", f"DELETE FROM metrics WHERE step = 2 AND run_uuid = {RUN}"),
        ["trial 1 of tiny-v1-digits: trained 2 epochs, and its run", "finished 2 epochs, and has points of 1"],
    ),
    "a point is doubled": (
        ("mlflow.db", "INSERT INTO metrics (key, value, timestamp, step, is_nan, run_uuid) "
            "SELECT key, value, timestamp + 1, step, is_nan, run_uuid FROM metrics "
            f"WHERE key = 'val/loss' AND step = 1 AND run_uuid = {RUN}"),
        ["val/loss has 3 points for 2 epochs"],
    ),
    "another score": (
        ("optuna.db", "UPDATE trial_values SET value = value + 1e-9 WHERE trial_id = 2"),
        ["trial 1 of tiny-v1-digits: has val/accuracy 0."],
    ),
    "another state": (
        ("mlflow.db", f"UPDATE tags SET value = 'pruned' WHERE key = 'state' AND run_uuid = {RUN}"),
        ["trial 1 of tiny-v1-digits: is finished in Optuna; its run"],
    ),
    "requeued without a successor": (
        ("optuna.db", f"INSERT INTO {ATTRIBUTE} VALUES (2, 'requeued', 'true')"),
        ["trial 1 of tiny-v1-digits: was requeued, and has 0 successors"],
    ),
    "a second parent": (
        ("optuna.db", "UPDATE study_user_attributes SET value_json = '\"ab\"' WHERE key = 'mlflow_run_id'"),
        ["is a second parent run of its study", *["should have one run in MLflow, and has 0"] * 2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_and_not_repaired_by_guessing(fault: str, home: Path) -> None:
    (database, *statements), expected = FAULTS[fault]
    change(home, database, *statements)
    seen = findings(home)
    assert len(seen) == len(expected), seen
    for text in expected:
        assert any(text in line for line in seen), (text, seen)
    fix(home)
    assert findings(home) == seen


def test_what_a_dead_process_left_running_is_repaired(home: Path) -> None:
    change(home, "mlflow.db", RUNNING, OF_A_DEAD_PROCESS)
    change(
        home,
        "optuna.db",
        "UPDATE trials SET state = 'RUNNING' WHERE trial_id = 2",
        f"UPDATE trial_user_attributes SET value_json = '{GONE}' WHERE key = 'worker' AND trial_id = 2",
    )
    seen = findings(home)
    assert len(seen) == 2, seen
    assert ", run " in seen[0] and "is RUNNING in MLflow, and its process is gone; `audit --fix` closes it" in seen[0]
    assert seen[1].startswith(
        "trial 1 of tiny-v1-digits: is RUNNING, and its process is gone; `audit --fix` requeues it"
    )
    assert fix(home)[0] == "trial 1 of tiny-v1-digits: its process was gone; it is requeued"
    assert findings(home) == []
    assert [trial.state.name for trial in open_storage(home).get_all_trials(1)] == ["COMPLETE", "FAIL", "WAITING"]


def test_runs_of_living_and_of_unknown_processes_are_left_alone(home: Path) -> None:
    """Of another folder mlruns, with the same tracker: neither journal nor lock nor trial of theirs is here."""
    change(home, "mlflow.db", RUNNING)
    for change_of_tags, expected in (
        (None, "runs, or can't be seen from here"),
        (f"DELETE FROM tags WHERE key = 'worker' AND run_uuid = {RUN}", "has no tag `worker`"),
    ):
        if change_of_tags:
            change(home, "mlflow.db", change_of_tags)
        seen = audit(None, MlflowTracker(home))
        assert not seen.findings
        assert any(expected in line for line in all_lines(seen.unchecked)), seen
        assert repair(None, MlflowTracker(home)) == []


def test_running_study_is_checked_by_what_has_ended(home: Path) -> None:
    change(home, "mlflow.db", RUNNING, OF_A_DEAD_PROCESS)
    change(home, "optuna.db", "UPDATE trials SET state = 'RUNNING' WHERE trial_id = 2")
    with FileLock(home / "tiny-v1-digits.lock"):
        seen = check(home)
        assert not seen.findings
        assert all_lines(seen.unchecked) == ["tiny-v1-digits: is running; only what has ended was checked"]
        assert fix(home) == []
    assert len(findings(home)) == 1, "the run; of the trial, its worker lives: this process"


def test_flipped_bit_in_a_models_weights_is_found(home: Path) -> None:
    for file in home.glob("artifacts/*/artifacts/weights.safetensors"):
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    seen = findings(home)
    assert len(seen) == 2 and all("damaged, its digest differs; `reproduce" in line for line in seen)


def test_changed_file_of_a_registered_model_is_found(trained: Trained, packed: Package, tmp_path: Path) -> None:
    trained.copy(tmp_path / "mlruns")
    home, folder = tmp_path / "mlruns", tmp_path / "packed"
    shutil.copytree(packed.folder, folder)
    with registered(Trained(home, trained.finished, ""), Package(folder, packed.sha256, "", 0, 0.0, None)):
        assert not all_lines(audit(None, MlflowTracker(home)).findings)
        (folder / "card.md").write_text("the best")
        (seen,) = all_lines(audit(None, MlflowTracker(home)).findings)
        assert (
            "image-classifier version 1: card.md: its SHA-256 differs; put its files back; where they are gone" in seen
        )
        assert "rollback" not in seen, "there is no version before"


def test_cut_off_promotion_and_deleted_version_are_found(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promote, "CHANGE_WAIT_S", 0.1)
    trained.copy(tmp_path / "mlruns")
    home = tmp_path / "mlruns"
    book = ledger.Ledger(home)
    begun = book.begin(ledger.PROMOTED, "image-classifier", trained.finished, None, previous=None, version="1")
    with promote.registry_lock(home):
        during = audit(None, MlflowTracker(home))
    assert during.findings == [], "it is not cut off while its command lives"
    assert "another command is changing the champion" in all_lines(during.unchecked)[-1]
    (seen,) = all_lines(audit(None, MlflowTracker(home)).findings)
    assert "was cut off; `history` finishes or undoes it" in seen
    book.end(begun, ledger.PROMOTED, "1")
    (seen,) = all_lines(audit(None, MlflowTracker(home)).findings)
    assert "version 1 was deleted in MLflow; `audit --fix` removes it from the champions" in seen


def test_leftovers_of_killed_processes_are_repaired_losslessly(home: Path) -> None:
    key = key_of(home, 1)
    save_folder(home / "checkpoints" / key / "epoch-000001", {"state.safetensors": b"x"}, {})
    (home / FOLDER / ("a" * 32)).mkdir(parents=True)
    journal = Journal(home / FOLDER / key)
    journal.append({"kind": "start", "address": "mlflow.db", "time": 1, "name": "trial 1", "tags": {}, "params": {},
        "experiment": "tiny-v1-digits"}, durable=True)  # fmt: skip
    journal.append({"kind": "metrics", "step": 2, "time": 1, "values": {"val/new": 1.0}}, durable=True)
    journal.append({"kind": "end", "status": "FINISHED", "time": 2, "tags": {"state": "finished"}}, durable=True)
    journal.release()
    (home / "weights").mkdir()
    (home / "weights" / ".weights.7.new").touch()
    (home / ".gitignore").touch()  # a person's
    for path in (home / "weights" / ".weights.7.new", home / ".gitignore"):
        os.utime(path, (0, 0))
    seen = findings(home)
    expected = [
        "is not in MLflow yet",
        "the checkpoints of a training that has ended",
        "was left by a command that was killed",
    ]
    assert len(seen) == 4 and all(any(words in line for line in seen) for words in expected), seen
    done = fix(home)
    assert any("1 journals of processes that are gone: sent to MLflow" in line for line in done), done
    assert findings(home) == [] and (home / ".gitignore").exists()
    with contextlib.closing(sqlite3.connect(home / "mlflow.db")) as connection:
        assert connection.execute("SELECT value FROM metrics WHERE key = 'val/new'").fetchall() == [(1.0,)]


def test_run_whose_journal_is_another_trackers_is_not_said_to_be_closable(home: Path) -> None:
    change(home, "mlflow.db", RUNNING)
    journal = Journal(home / FOLDER / key_of(home, 1))
    journal.append({"kind": "start", "address": "http://elsewhere"})
    journal.release()
    seen = check(home)
    assert not seen.findings, "`audit --fix` would not close it"
    assert any("belongs to another tracker, http://elsewhere" in line for line in all_lines(seen.unchecked))
    assert fix(home) == []


def test_journal_of_a_living_process_is_left_alone(home: Path) -> None:
    journal = Journal(home / FOLDER / key_of(home, 1))
    journal.append({"kind": "start", "address": "mlflow.db"})
    assert not findings(home)
    assert not fix(home)
    assert (journal.folder / RECORDS).exists()
    journal.release()


def test_broken_database_is_found_before_it_is_read(home: Path) -> None:
    content = bytearray((home / "optuna.db").read_bytes())
    content[4096 * 3 : 4096 * 6] = b"\xaa" * 4096 * 3
    (home / "optuna.db").write_bytes(content)
    (seen,) = all_lines(check_databases(home))
    assert "optuna.db: broken (" in seen
