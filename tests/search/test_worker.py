"""A worker's heartbeat, and how a worker ends; its life as a process is tested in test_local_pool.py."""

import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from study_harness import StudyHarness

from pipeline.data.cache import in_memory
from pipeline.data.folder import read_folder
from pipeline.errors import DataError
from pipeline.processes import sign_of_life
from pipeline.search import worker
from pipeline.search.optuna_internals import fail_trial
from pipeline.search.search import Search
from pipeline.search.trial_attributes import Progress, TrialAttributes
from pipeline.search.worker import Assignment, Ended, Heartbeat, Limits, packed, work
from pipeline.sections.data import Form
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


def test_worker_that_is_asked_to_stop_completes_what_it_does(
    harness: StudyHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[str] = []
    monkeypatch.setattr(worker, "_end_process", ends.append)
    with Heartbeat(harness.storage, Limits(0.02, 0.5, 60.0), lambda: True) as heartbeat:
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            heartbeat.note_activity()  # as a validation, or a model that is written, does
            time.sleep(0.02)
        assert not ends


def test_reading_images_is_a_sign_of_life_and_can_be_stopped(
    harness: StudyHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first trial of another size may read images for longer than a training may stall."""
    harness.run(1)
    for number in range(4):
        file = tmp_path / "pets" / ("cat" if number % 2 else "dog") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(file)
    assignment = assignment_of(harness, harness.search(2), tmp_path)
    is_noted: list[bool] = []

    def read(study: Any, context: Any, heartbeat: Heartbeat, owner: Any) -> None:
        heartbeat._last_activity = -1.0
        sign_of_life()
        assert heartbeat._last_activity > 0
        heartbeat._last_activity = -1.0
        try:
            in_memory(read_folder(tmp_path / "pets"), Form(8))
        finally:
            is_noted.append(heartbeat._last_activity > 0)

    monkeypatch.setattr(worker, "_run_trials", read)
    assert work(assignment, lambda: False) == work(assignment, lambda: True) == Ended() and is_noted == [True, True]


def assignment_of(harness: StudyHarness, search: Search, data_dir: Path) -> Assignment:
    return Assignment(
        search=packed(search),
        storage=harness.storage.url,
        tracking_uri=harness.tracker.uri,
        home=harness.home,
        data_dir=data_dir,
        parent_run="",
    )


def test_errors_of_a_worker_reach_the_supervisor(harness: StudyHarness, tmp_path: Path) -> None:
    base = harness.base.changed({"data.dataset": str(tmp_path / "none")})
    ended = work(assignment_of(harness, harness.search(1, base=base), tmp_path), lambda: False)
    assert isinstance(ended.error, DataError) and "none" in ended.error.lines[0] and not ended.bug


def test_bug_of_a_worker_is_a_traceback(tmp_path: Path) -> None:
    assignment = Assignment(
        search=b"no pickle", storage="", tracking_uri="", home=tmp_path, data_dir=tmp_path, parent_run=""
    )
    assert "UnpicklingError" in work(assignment, lambda: False).bug
