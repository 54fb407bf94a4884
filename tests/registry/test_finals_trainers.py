"""Finals in several worker processes: real ones, on a real store."""

import os
import signal
import time
from collections.abc import Callable

import pytest
from fork_server import Spawning, shared_fork_server

from pipeline import worker_process
from pipeline.errors import UserError
from pipeline.experiment import Interrupted
from pipeline.registry.finals import plan_finals
from pipeline.registry.finals_run import run_finals
from pipeline.registry.finals_worker import STOP_REASON
from pipeline.tracking.tags import RunTags
from registry.finals_harness import CPU, RecordingObserver, StudyHarness, with_two_trials

pytestmark = pytest.mark.usefixtures("one_drawing_a_figure")


@pytest.fixture
def harness(new_harness: Callable[[], StudyHarness]) -> StudyHarness:
    return with_two_trials(new_harness())


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers without their imports, seconds each: for all but the first test."""
    monkeypatch.setenv("FORK_SERVER", shared_fork_server().address)
    monkeypatch.setattr(worker_process, "subprocess", Spawning)


def workers_of(harness: StudyHarness) -> set[int]:
    """The processes that train now."""
    tags = [RunTags.of(run) for run in harness.runs() if run.info.status == "RUNNING"]
    return {tag.worker["pid"] for tag in tags if tag.worker}


def test_two_workers_train_what_one_would(harness: StudyHarness, new_harness: Callable[[], StudyHarness]) -> None:
    alone, observer = with_two_trials(new_harness()).finals(seeds=3), RecordingObserver()
    decision = harness.finals(seeds=3, workers=2, observer=observer)
    assert [c.score for c in decision.candidates] == [c.score for c in alone.candidates], "with one thread each"
    assert decision.winner and alone.winner
    assert (decision.winner.trial, decision.winner.seed) == (alone.winner.trial, alone.winner.seed)
    assert sorted(observer.outcomes) == [f"trial {t}, seed {s}" for t in ("0 (control)", "1") for s in (1, 2, 3)]
    runs = {run.info.run_id: RunTags.of(run) for run in harness.runs()}
    trained = [seed.run_id for candidate in decision.candidates for seed in candidate.runs]
    assert sorted(map(str, trained)) == sorted(runs), "each has its run in MLflow"
    processes = {tags.worker["pid"] for tags in runs.values() if tags.worker}
    assert len(processes) == 2 and os.getpid() not in processes
    again = RecordingObserver()
    harness.finals(seeds=3, workers=2, observer=again)
    assert not again.outcomes


@pytest.mark.usefixtures("forked")
def test_folds_are_trained_in_workers(harness: StudyHarness) -> None:
    planned = plan_finals(harness.tracker, harness.study, CPU, 1, 9, folds=3)
    decision = run_finals(harness.tracker, planned, harness.data, CPU, RecordingObserver(), harness.home, workers=2)
    assert decision and decision.folds == 3
    assert sorted(run.data.params["data.fold"] for run in harness.runs()) == ["0", "0", "1", "1", "2", "2"]


@pytest.mark.usefixtures("forked")
def test_interrupted_workers_end_and_their_trainings_resume(harness: StudyHarness) -> None:
    harness.trial(2, 0.99, optimizer__lr=0.06, training__epochs=20)

    def press() -> None:
        if len(seen := workers_of(harness)) == 2 and not pids:
            pids.update(seen)
            os.kill(os.getpid(), signal.SIGINT)

    pids: set[int] = set()
    with pytest.raises(Interrupted):
        harness.finals(seeds=2, workers=2, observer=RecordingObserver(press))
    assert len(pids) == 2 and not shared_fork_server().workers()
    states = [RunTags.of(run).reason for run in harness.runs() if run.info.status != "FINISHED"]
    assert states and set(states) == {STOP_REASON}
    decision = harness.finals(seeds=2, workers=2)
    assert decision.winner and {run.info.status for run in harness.runs()} == {"FINISHED"} and len(harness.runs()) == 4
    for run in harness.runs():
        points = harness.tracker.client.get_metric_history(run.info.run_id, "val/accuracy")
        assert [point.step for point in points] == list(range(1, len(points) + 1)), "gone on with, each epoch once"


@pytest.mark.usefixtures("forked")
def test_killed_worker_ends_the_finals_with_the_cause(harness: StudyHarness) -> None:
    harness.trial(2, 0.99, optimizer__lr=0.06, training__epochs=200)
    killed: list[int] = []

    def kill() -> None:
        if not killed and (pids := workers_of(harness)):
            killed.append(pids.pop())
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(
        UserError, match=r"worker \d: its process was killed by SIGKILL; the same command resumes; fewer"
    ):
        harness.finals(seeds=1, workers=2, observer=RecordingObserver(kill))
    assert killed and not shared_fork_server().workers() and harness.tracker.flush(30)
    assert not [run for run in harness.runs() if run.info.status == "RUNNING"], "its run was closed"


def test_workers_of_killed_finals_end_and_the_same_command_resumes(harness: StudyHarness) -> None:
    harness.trial(2, 0.99, optimizer__lr=0.06, training__epochs=25)
    server, folder = shared_fork_server(), harness.home.parent
    words = ["finals", harness.name, "--top", "1", "--seeds", "2", "--workers", "2"]
    first = server.start(words, folder, folder / "log")
    limit = time.monotonic() + 120
    while len(pids := workers_of(harness)) < 2:
        assert time.monotonic() < limit and first.code() is None, (folder / "log").read_text()
        time.sleep(0.2)
    first.signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    again = server.start(words, folder, folder / "log")  # at once, while the orphans still end
    assert again.wait() == 0, (folder / "log").read_text()
    assert not pids & set(server.workers())
    assert len(harness.runs()) == 4 and {run.info.status for run in harness.runs()} == {"FINISHED"}
    for run in harness.runs():
        points = harness.tracker.client.get_metric_history(run.info.run_id, "val/accuracy")
        assert [point.step for point in points] == list(range(1, len(points) + 1)), "each epoch once"
