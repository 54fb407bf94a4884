"""Which trials are requeued, and what their successors know."""

import json
import subprocess
import sys
from typing import Any

import pytest
from filelock import FileLock
from optuna.trial import TrialState
from study_harness import StudyHarness, rates

from pipeline.processes import this_process
from pipeline.search.optuna_internals import storage_of, trial_id
from pipeline.search.requeue import reconcile, requeue
from pipeline.search.stored_study import num_finished
from pipeline.search.study_attributes import StudyAttributes
from pipeline.search.trial_attributes import TrialAttributes
from pipeline.tracking import recovery


def test_reconcile_requeues_trials_of_exited_processes_only(
    harness: StudyHarness, caplog: pytest.LogCaptureFixture
) -> None:
    harness.run(1)
    study = harness.study()
    code = "import json; from pipeline.processes import this_process; print(json.dumps(this_process()))"
    exited = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    dead, alive = study.ask(), study.ask()
    rates(dead)
    rates(alive)
    dead.set_user_attr("worker", exited)
    alive.set_user_attr("worker", this_process())

    parent = StudyAttributes.of(study).mlflow_run_id
    caplog.set_level("INFO", "pipeline")
    assert reconcile(study, harness.tracker, parent) == [dead.number]
    assert caplog.messages == [f"trial {dead.number}, whose process has exited, is requeued"]
    trials = harness.trials()
    assert trials[dead.number].state == TrialState.FAIL
    assert trials[alive.number].state == TrialState.RUNNING
    waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
    assert [TrialAttributes.of(trial).retry_of for trial in waiting] == [dead.number]
    assert num_finished(harness.study()) == 1
    assert reconcile(study, harness.tracker, parent) == []


def test_other_studies_do_not_wait_while_runs_are_closed(
    harness: StudyHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.run(1)
    close, taken = recovery.close_abandoned_trials, []

    def close_slowly(*about: Any) -> None:
        with FileLock(harness.home / "optuna.lock", timeout=0):  # as each command that opens a study takes it
            taken.append(True)
        close(*about)

    monkeypatch.setattr(recovery, "close_abandoned_trials", close_slowly)
    reconcile(harness.study(), harness.tracker, StudyAttributes.of(harness.study()).mlflow_run_id)
    assert taken


def test_trial_that_died_inside_its_space_is_requeued_once(harness: StudyHarness) -> None:
    study = harness.run(1)
    study.enqueue_trial({"optimizer.lr": 0.5, "optimizer.momentum": 0.7}, user_attrs={"control": True})
    trial = study.ask()
    trial.suggest_float("optimizer.lr", 1e-3, 1, log=True)  # killed before it asks for the momentum
    trial.set_constraint("model/parameters", -5)
    storage_of(study).set_trial_system_attr(trial_id(trial), "grid_id", 3)
    requeue(study, trial)
    requeue(study, trial)
    waiting = study.get_trials(states=(TrialState.WAITING,))
    assert [successor.system_attrs["fixed_params"] for successor in waiting] == [
        {"optimizer.lr": 0.5, "optimizer.momentum": 0.7}
    ]
    assert waiting[0].system_attrs["grid_id"] == 3, "what the sampler knows it by"
    assert not waiting[0].constraints, "measured anew"
    assert waiting[0].user_attrs == {"retry_of": trial.number, "control": True}
