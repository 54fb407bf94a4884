"""A worker's heartbeat, and how a worker ends; its life as a process is tested in test_local_pool.py."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from study_harness import StudyHarness

from pipeline.errors import DataError, Problem, UserError
from pipeline.search import worker
from pipeline.search.optuna_internals import fail_trial
from pipeline.search.trial_attributes import Progress, TrialAttributes
from pipeline.search.worker import Assignment, Ended, Heartbeat, Limits, packed, work
from pipeline.tracking.tracker import OwnershipLost
from pipeline.training.loop import EpochReport


def test_heartbeats_report_progress_until_the_trial_is_lost(harness: StudyHarness) -> None:
    study = harness.run(1)
    trial = study.ask()
    with Heartbeat(harness.storage, Limits(heartbeat_s=0.02), lambda: False) as heartbeat, heartbeat.of(trial):
        heartbeat.step(trial.number, Progress(2, 3, 7, 5.0))
        heartbeat.epoch(trial.number, EpochReport(1, {"val/accuracy": 0.5}))
        deadline = time.monotonic() + 10
        while (beat := TrialAttributes.of(harness.trials()[1]).heartbeat) is None or not beat.metrics:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert (beat.progress, beat.measured_epoch) == (Progress(2, 3, 7, 5.0), 1)
        fail_trial(study, study.trials[1])
        time.sleep(0.5)  # many heartbeats
        with pytest.raises(OwnershipLost):
            heartbeat.step(trial.number, Progress())


@pytest.mark.parametrize(
    ("limits", "stop"),
    [(Limits(0.02, 60.0, 0.1), False), (Limits(0.02, 0.1, 60.0), True)],
    ids=["stalled", "not stopped"],
)
def test_process_that_stalls_or_does_not_stop_ends_itself(
    limits: Limits, stop: bool, harness: StudyHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[str] = []
    monkeypatch.setattr(worker, "_end_process", ends.append)
    trial = harness.run(1).ask()
    with Heartbeat(harness.storage, limits, lambda: stop) as heartbeat, heartbeat.of(trial):
        deadline = time.monotonic() + 10
        while not ends:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    expected = "a worker did not stop when it was asked to" if stop else f"trial {trial.number}: no step for 0 s"
    assert ends[0] == f"{expected}; its process ends"


def test_errors_of_a_worker_reach_the_supervisor(harness: StudyHarness, tmp_path: Path) -> None:
    base = harness.base.changed({"data.dataset": str(tmp_path / "none")})
    assignment = Assignment(
        search=packed(harness.search(1, base=base)),
        storage=harness.storage.url,
        tracking_uri=harness.tracker.uri,
        home=harness.home,
        data_dir=tmp_path,
        parent_run="",
    )
    ended = work(assignment, lambda: False)
    assert ended.error and not ended.bug
    error = Ended(**asdict(ended)).as_error()
    assert isinstance(error, UserError) and "none" in error.lines[0]


def test_error_keeps_its_class_and_problems() -> None:
    problem: Any = asdict(Problem("a", "b", "c", ("d",)))
    error = Ended(error="DataError", problems=[problem | {"details": ["d"]}]).as_error()
    assert isinstance(error, DataError) and error.lines == ["a: b; c", "  d"]


def test_bug_of_a_worker_is_a_traceback(tmp_path: Path) -> None:
    assignment = Assignment(
        search=b"no pickle", storage="", tracking_uri="", home=tmp_path, data_dir=tmp_path, parent_run=""
    )
    assert "UnpicklingError" in work(assignment, lambda: False).bug
