"""Finals in several worker processes: real ones, on a real store."""

import contextlib
import dataclasses
import itertools
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fork_server import Spawning, shared_fork_server
from PIL import Image

from pipeline import worker_process
from pipeline.data.datasets import load
from pipeline.data.prepare import TrainingData, prepare
from pipeline.errors import DataError, UserError
from pipeline.experiment import Interrupted
from pipeline.processes import StopOnSignal
from pipeline.registry import finals_trainers
from pipeline.registry.finals import plan_finals
from pipeline.registry.finals_run import run_finals
from pipeline.registry.finals_trainers import Training, WorkerSetup, trainers
from pipeline.registry.finals_worker import STOP_REASON, find_dataset
from pipeline.sections.data import Data
from pipeline.tracking.tags import RunTags, State
from pipeline.training.placement import Placement
from pipeline.worker_process import WorkerBug
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


def workers_of(harness: StudyHarness, *trials: int) -> set[int]:
    """The processes that train now; of these trials only, where there are any."""
    tags = [RunTags.of(run) for run in harness.runs() if run.info.status == "RUNNING"]
    return {tag.worker["pid"] for tag in tags if tag.worker and (not trials or tag.trial in trials)}


def assert_complete(harness: StudyHarness, trainings: int) -> None:
    """So many finished runs with each epoch once, no other run, and no process."""
    assert not shared_fork_server().workers() and harness.tracker.flush(30)
    assert [run.info.status for run in harness.runs()] == ["FINISHED"] * trainings
    for run in harness.runs():
        points = harness.tracker.client.get_metric_history(run.info.run_id, "val/accuracy")
        assert [point.step for point in points] == list(range(1, int(run.data.params["training.epochs"]) + 1))


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
    decision = run_finals(harness.tracker, planned, harness.data, CPU, RecordingObserver(), workers=2)
    assert decision and decision.folds == 3
    assert sorted(run.data.params["data.fold"] for run in harness.runs()) == ["0", "0", "1", "1", "2", "2"]


@pytest.mark.usefixtures("forked")
def test_interrupted_workers_end_and_their_trainings_resume(harness: StudyHarness) -> None:
    harness.trial(2, 0.99, optimizer__lr=0.06, training__epochs=16)

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
    assert decision.winner
    assert_complete(harness, 4)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.chaos)])
def test_another_worker_goes_on_where_one_died(number: signal.Signals, harness: StudyHarness) -> None:
    harness.trial(2, 0.99, optimizer__lr=0.06, training__epochs=16)
    hit: list[int] = []

    def hurt() -> None:
        if not hit and (pids := workers_of(harness, 2)):  # far from its end
            hit.append(pids.pop())
            os.kill(hit[0], number)

    observer = RecordingObserver(hurt)
    assert harness.finals(seeds=2, workers=2, observer=observer).winner and hit
    [line] = [line for line in observer.lines if line.startswith("worker ")]
    cause = "was killed by SIGKILL" if number is signal.SIGKILL else "ended with 0"
    assert re.fullmatch(rf"worker \d: its process {cause}; another one goes on with trial \d.*, seed \d", line)
    assert_complete(harness, 4)


@pytest.mark.usefixtures("forked")
def test_deaths_in_a_row_end_the_finals_with_the_cause(harness: StudyHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.trial(2, 0.99, optimizer__lr=0.06, training__epochs=200)
    monkeypatch.setattr(finals_trainers, "MAX_DEATHS", 1)

    def kill() -> None:
        for pid in workers_of(harness):
            with contextlib.suppress(ProcessLookupError):  # it was killed an epoch ago
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(
        UserError, match=r"worker \d: its process was killed by SIGKILL, .*; the same command resumes; few"
    ):
        harness.finals(seeds=1, workers=2, observer=RecordingObserver(kill))
    assert not shared_fork_server().workers() and harness.tracker.flush(30)
    assert not [run for run in harness.runs() if run.info.status == "RUNNING"], "its run was closed"


@pytest.mark.usefixtures("forked")
def test_training_that_is_not_needed_any_more_is_stopped_and_can_be_needed_again(harness: StudyHarness) -> None:
    harness.trial(2, 0.99, optimizer__lr=0.06, training__epochs=20)
    plan, study, stop = harness.plan(1, 2), harness.study, StopOnSignal()
    keys = (f"{number:032x}" for number in itertools.count(1))
    made = [Training(c, c.with_seed(seed), next(keys)) for c in plan.candidates for seed in plan.seeds]
    short, long = [made[:2], made[2:]]  # the control's, and those of 20 epochs
    about, observer = long[0].recipe.data, RecordingObserver()
    with trainers(harness.tracker, study, harness.data, about, CPU, 2, observer, stop) as pool:
        first, outcome = pool.next_ended([short[0], long[0]])
        assert (first, outcome.state) == (short[0], State.FINISHED)
        second, outcome = pool.next_ended([short[1]])
        assert (second, outcome.state) == (short[1], State.FINISHED)
        assert len(workers_of(harness)) <= 1, "it ends at its next step"
        assert observer.outcomes[long[0].name].state is State.INTERRUPTED
        last, outcome = pool.next_ended([long[0]])
        assert (last, outcome.state, outcome.epochs) == (long[0], State.FINISHED, 20)
    assert_complete(harness, 3)


@pytest.mark.usefixtures("forked")
def test_error_and_bug_of_a_worker_end_the_finals(harness: StudyHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = harness.plan(1, 1).candidates[0]
    training = Training(candidate, candidate.with_seed(1), "1" * 32)
    about = training.recipe.data

    def train(data: TrainingData) -> None:
        stop, observer = StopOnSignal(), RecordingObserver()
        with trainers(harness.tracker, harness.study, data, about, CPU, 2, observer, stop) as pool:
            pool.next_ended([training])

    with pytest.raises(DataError, match=f"study {harness.name}: its data set, digest ffffffffffff, is not in"):
        train(dataclasses.replace(harness.data, digest="f" * 64))
    monkeypatch.setattr(finals_trainers, "placements", lambda *device: [Placement("cuda:77")] * 2)
    with pytest.raises(WorkerBug, match=r"in worker 1:\nTraceback(.|\n)*set_up"):
        train(harness.data)
    assert not shared_fork_server().workers() and not harness.runs()


def test_worker_finds_data_behind_links(tmp_path: Path, harness: StudyHarness) -> None:
    """Where the command found it: a manifest's images lie beside the link to it, and not beside the file."""
    images, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    images.mkdir()
    elsewhere.mkdir()
    lines = ["path,label"]
    for number in range(12):
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(images / f"{number}.png")
        lines.append(f"{number}.png,{'ab'[number % 2]}")
    (elsewhere / "list.csv").write_text("\n".join(lines))
    (link := images / "link.csv").symlink_to(elsewhere / "list.csv")
    about = Data(dataset=str(link), image_size=8, test_fraction=0, validation_fraction=0.25)
    data = prepare(load(about, Path(), tmp_path), about, CPU)
    setup = WorkerSetup(
        tmp_path, "", harness.study, about, data.digest, data.source, data.listed is not None, Placement()
    )
    assert find_dataset(setup).digest == data.digest


def test_workers_of_killed_finals_end_and_the_same_command_resumes(harness: StudyHarness) -> None:
    harness.trial(2, 0.99, optimizer__lr=0.06, training__epochs=16)
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
    assert_complete(harness, 4)
