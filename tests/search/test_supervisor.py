"""What the supervisor decides; its workers are threads of this process that claim trials of a real database."""

import copy
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial
from study_harness import RecordingObserver, StudyHarness, attributes_of, rates

from pipeline.errors import DataError, UserError
from pipeline.processes import StopOnSignal, this_process
from pipeline.search import supervisor
from pipeline.search.budget import Allowance
from pipeline.search.optuna_internals import study_id
from pipeline.search.requeue import mark_failed
from pipeline.search.short_trials import simulate
from pipeline.search.storage import open_storage
from pipeline.search.stored_study import num_finished, open_study
from pipeline.search.study_lock import StudyLock
from pipeline.search.supervisor import Supervisor, _HeartbeatMonitor, _StudyReporter
from pipeline.search.trial import StudyInterrupted, claim_trial
from pipeline.search.trial_attributes import Beat, Progress, TrialAttributes, update_attributes
from pipeline.search.worker import Assignment, Ended, Limits
from pipeline.tracking.tracker import State
from pipeline.worker_process import WorkerBug


class Died(Exception):
    """The worker's process is gone, and reported nothing."""


class ThreadWorker:
    """`act(trial, worker)` is what it does with a trial: it returns the score, or raises Died."""

    def __init__(self, home: Path, key: str, act: Callable[[optuna.Trial, "ThreadWorker"], float], launch: int):
        self.id = f"worker {launch}"
        self.stopped = threading.Event()
        self._ended: Ended | None = None
        self._storage = open_storage(home)
        self._study = optuna.load_study(study_name=key, storage=self._storage)
        self._act = act
        threading.Thread(target=self._run, daemon=True).start()

    def ended(self) -> Ended | None:
        return self._ended

    def stop(self) -> None:
        self.stopped.set()

    def kill(self) -> None:
        self.stopped.set()
        self._ended = self._ended or Ended(died="killed")

    def _run(self) -> None:
        ended = Ended()
        try:
            while not self.stopped.is_set():
                if trial := claim_trial(self._study, self._storage, this_process() | {"id": self.id}):
                    score = self._act(trial, self)
                    if TrialAttributes.of(trial).short:
                        trial.report(score, 2)
                        self._study.tell(trial, state=TrialState.PRUNED)
                    else:
                        self._study.tell(trial, score)
                else:
                    time.sleep(0.02)
        except Died as error:
            ended = Ended(died=str(error) or "for no reason")
        except UserError as error:
            ended = Ended(error=error)
        except ZeroDivisionError as error:
            ended = Ended(bug=f"Traceback: {error!r}")
        except ValueError:
            ended = Ended()  # it was killed
        self._ended = self._ended or ended


class SupervisedStudy:
    """A study, and the supervisor of its thread workers."""

    def __init__(self, harness: StudyHarness, trials: int, **limits: Any):
        self.harness, self.storage, self.tracker = harness, harness.storage, harness.tracker
        self.search = harness.search(trials, **limits)
        self.study = open_study(self.search, harness.data, harness.storage, harness.home)
        self.parent_run = harness.tracker.open_study(harness.key, "?", "val/accuracy", []).id
        self.stop, self.observer = StopOnSignal(), RecordingObserver()
        self.workers: list[ThreadWorker] = []

    def run(
        self,
        act: Callable[[optuna.Trial, ThreadWorker], float],
        workers: int = 2,
        limits: Limits | None = None,
        start: Callable[[int, int], Any] | None = None,
    ) -> None:
        def start_thread(slot: int, launch: int) -> ThreadWorker:
            self.workers.append(ThreadWorker(self.harness.home, self.harness.key, act, launch))
            return self.workers[-1]

        Supervisor(
            context=replace(self.harness.context(self.search, self.observer), parent_run=self.parent_run),
            study=self.study,
            pool=FakeWorkerPool(start or start_thread, workers, limits or Limits()),
            assign=self.assignment,
            stop=self.stop,
            lock=StudyLock(self.storage, self.harness.home, self.harness.key),
            allowance=Allowance(self.search, self.study),
        ).run()

    def assignment(self, launch: int) -> Assignment:
        folders = {"home": self.harness.home, "data_dir": self.harness.home}
        return Assignment(search=b"", storage="", tracking_uri="", parent_run=self.parent_run, launch=launch, **folders)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(states=states or None)


@dataclass
class FakeWorkerPool:
    """A WorkerPool; `start_worker(slot, launch)` starts a worker."""

    start_worker: Callable[[int, int], Any]
    workers: int
    limits: Limits
    data_dir: Path = Path()

    def capacity(self) -> int:
        return self.workers

    def start(self, assignment: Assignment, slot: int) -> Any:
        return self.start_worker(slot, assignment.launch)


def scores(trial: optuna.Trial, worker: ThreadWorker) -> float:
    rates(trial)
    time.sleep(random.random() / 100)
    return trial.params["optimizer.lr"]


@pytest.fixture(autouse=True)
def short_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "TICK_S", 0.02)


Supervise = Callable[..., SupervisedStudy]


@pytest.fixture
def supervise(harness: StudyHarness) -> Supervise:
    return lambda trials, **limits: SupervisedStudy(harness, trials, **limits)


def test_many_workers_keep_the_budget_exactly(supervise: Supervise) -> None:
    supervised = supervise(25)
    supervised.run(scores, workers=5)
    assert [trial.state for trial in supervised.trials()] == [TrialState.COMPLETE] * 25
    owners = {attributes.worker_id for attributes in attributes_of(supervised.trials())}
    assert len(owners) > 1 and len(supervised.workers) == 5
    assert set(supervised.observer.outcomes) == set(range(25))
    resumed = supervise(27)
    resumed.run(scores, workers=5)
    assert len(resumed.trials()) == 27 and len(resumed.workers) == 2, "no more workers than trials"


def test_one_worker_gets_the_trials_of_a_study_without_workers(supervise: Supervise, harness: StudyHarness) -> None:
    """Short or in full, as what has ended says: not as what had ended when the trial before began."""
    supervised = supervise(12, base=harness.base.changed({"training.epochs": 8}))
    supervised.run(scores, workers=1)
    short = [trial.intermediate_values[2] for trial in supervised.trials(TrialState.PRUNED)]
    in_full = [not attributes.short for attributes in attributes_of(supervised.trials())]
    assert in_full == [True, *simulate([*short, *[0.0] * (11 - len(short))])] and in_full[-1]


def test_the_last_trial_waits_for_the_short_ones(supervise: Supervise, harness: StudyHarness) -> None:
    """Though a worker dies in one of the last: the best short trial is trained in full."""
    died: list[int] = []

    def better_and_better(trial: optuna.Trial, worker: ThreadWorker) -> float:
        rates(trial)
        is_late = trial.number > 5 and TrialAttributes.of(trial).short
        time.sleep(0.5 * is_late)
        if is_late and not died:
            died.append(trial.number)
            raise Died
        return trial.number / 100

    supervised = supervise(12, base=harness.base.changed({"training.epochs": 8}))
    supervised.run(better_and_better, workers=4)
    assert num_finished(supervised.study) == 12 and died
    best = max(trial.number for trial in supervised.trials(TrialState.PRUNED))
    full_of = [attributes.full_of for attributes in attributes_of(supervised.trials())]
    assert best in full_of and full_of[-1] is not None


def test_trial_that_kills_its_worker_three_times_fails(
    supervise: Supervise,
) -> None:
    def die(trial: optuna.Trial, worker: ThreadWorker) -> float:
        rates(trial)
        if TrialAttributes.of(trial).control:
            trial.set_user_attr("run_key", TrialAttributes.of(trial).run_key or "c" * 32)
            trial.report(0.5, 1)
            raise Died("by SIGKILL")
        return scores(trial, worker)

    supervised = supervise(4)
    state = supervised.harness.home / "checkpoints" / ("c" * 32)
    (state / "epoch-000001").mkdir(parents=True)
    supervised.run(die)
    assert not state.exists(), "no trial resumes from there"
    dead = supervised.trials(TrialState.FAIL)
    assert [attributes.deaths for attributes in attributes_of(dead)] == [0, 1, 2]
    assert [attributes.requeued for attributes in attributes_of(dead)] == [True, True, False]
    assert {attributes.run_key for attributes in attributes_of(dead)} == {"c" * 32}
    assert all(attributes.control for attributes in attributes_of(dead))
    assert [attributes.retry_of for attributes in attributes_of(dead)][1:] == [trial.number for trial in dead][:2]
    assert all(trial.params == dead[0].params and trial.intermediate_values == {1: 0.5} for trial in dead)
    assert TrialAttributes.of(dead[2]).reason == "by SIGKILL; so it ended 3 times"
    assert num_finished(supervised.study) == 4 and len(supervised.trials()) == 6
    assert supervised.observer.outcomes[dead[0].number].reason == "requeued"
    assert supervised.observer.outcomes[dead[2].number].state == State.FAILED
    run = supervised.tracker.client.get_run(supervised.tracker.id_of("c" * 32))
    assert (run.info.status, run.data.tags["trial"]) == ("FAILED", str(dead[2].number))
    assert run.data.tags["reason"] == TrialAttributes.of(dead[2]).reason


def test_trial_that_died_during_its_requeue_has_a_successor(
    supervise: Supervise,
) -> None:
    supervised = supervise(1)
    trial = supervised.study.ask()
    update_attributes(supervised.study, trial, deaths=2, requeued=True)
    mark_failed(
        supervised.study, supervised.trials(TrialState.RUNNING), "gone", supervised.tracker, supervised.parent_run
    )
    (queued,) = [
        successor
        for successor in attributes_of(supervised.trials(TrialState.WAITING))
        if successor.retry_of == trial.number
    ]
    assert queued.deaths == 2


def test_trial_that_fails_before_it_had_a_run_gets_one(supervise: Supervise) -> None:
    def die(trial: optuna.Trial, worker: ThreadWorker) -> float:
        if TrialAttributes.of(trial).control:
            raise Died("at once")
        return scores(trial, worker)

    supervised = supervise(3)
    supervised.run(die)
    (failed,) = [trial for trial in supervised.trials(TrialState.FAIL) if not TrialAttributes.of(trial).requeued]
    run = supervised.tracker.client.get_run(supervised.tracker.id_of(TrialAttributes.of(failed).run_key))
    assert (run.info.status, run.data.tags["trial"]) == ("FAILED", str(failed.number))


def test_worker_that_dies_at_each_start_stops_the_study(supervise: Supervise) -> None:
    class DeadWorker:
        id = "x"

        def ended(self) -> Ended:
            return Ended(died="its process ended with 1")

        def stop(self) -> None: ...

        kill = stop

    launches: list[int] = []

    def start(slot: int, launch: int) -> DeadWorker:
        launches.append(launch)
        return DeadWorker()

    supervised = supervise(4)
    with pytest.raises(UserError, match=r"died 3 times in a row and no trial ended .its process ended with 1"):
        supervised.run(scores, workers=1, start=start)
    assert launches == [1, 2, 3]


@pytest.mark.parametrize(
    ("error", "seen"), [(ZeroDivisionError("ours"), WorkerBug), (DataError("no images"), DataError)]
)
def test_bug_in_one_worker_stops_all(error: Exception, seen: Any, supervise: Supervise) -> None:
    def act(trial: optuna.Trial, worker: ThreadWorker) -> float:
        if trial.number == 1:
            raise error
        worker.stopped.wait()
        raise Died

    supervised = supervise(9)
    with pytest.raises(seen, match=r"ours|no images"):
        supervised.run(act, workers=3)
    assert not supervised.trials(TrialState.RUNNING), "the trials of the others are requeued"
    assert all(attributes.requeued for attributes in attributes_of(supervised.trials(TrialState.FAIL)))
    assert num_finished(supervised.study) == 0
    assert not any(attributes.deaths for attributes in attributes_of(supervised.trials())), "a stop is not a death"


def test_worker_without_heartbeat_is_killed_and_replaced(supervise: Supervise) -> None:
    def hang_once(trial: optuna.Trial, worker: ThreadWorker) -> float:
        rates(trial)
        for count in range(1 if trial.number == 0 else 8):
            update_attributes(trial.study, trial, heartbeat=Beat(count=count))
            time.sleep(0.1)
        if trial.number == 0:
            worker.stopped.wait()
            raise Died  # a killed process reports nothing
        return scores(trial, worker)

    supervised = supervise(3)
    supervised.run(hang_once, limits=Limits(heartbeat_timeout_s=0.5))
    (stuck,) = supervised.trials(TrialState.FAIL)
    assert stuck.number == 0 and TrialAttributes.of(stuck).requeued
    assert num_finished(supervised.study) == 3
    assert sum(worker.ended() == Ended(died="killed") for worker in supervised.workers) == 1


def test_silence_counts_only_while_the_database_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: clock[0])

    def running(count: int) -> list[FrozenTrial]:
        attributes = TrialAttributes(heartbeat=Beat(count=count))
        return [create_trial(state=TrialState.WAITING, user_attrs=attributes.to_optuna())]

    monitor = _HeartbeatMonitor(timeout_s=10)
    number = running(1)[0].number
    assert not monitor.silent(running(1))
    for clock[0] in (3.0, 6.0, 9.0):
        assert not monitor.silent(running(1))
    clock[0] = 900.0  # an outage of the database, or we were paused ourselves
    assert not monitor.silent(running(1))
    clock[0] = 901.5
    assert monitor.silent(running(1)) == {number}
    assert not monitor.silent(running(2)), "another heartbeat came"


def test_no_trial_is_released_after_the_timeout(supervise: Supervise) -> None:
    supervised = supervise(1000, timeout_s=0.5)
    supervised.run(scores)
    assert not supervised.trials(TrialState.RUNNING)
    assert 1 < num_finished(supervised.study) < 1000
    assert not supervised.storage.released(study_id(supervised.study))


def test_patience_ends_a_study_of_many_workers(supervise: Supervise) -> None:
    supervised = supervise(1000, patience=5)
    supervised.run(lambda trial, worker: 0.5, workers=3)
    assert 6 <= num_finished(supervised.study) <= 6 + 2 * 3, "what ran, and what had been released"


def test_stop_ends_all_workers_and_the_study_resumes(supervise: Supervise) -> None:
    supervised = supervise(9)

    def stopping(trial: optuna.Trial, worker: ThreadWorker) -> float:
        if trial.number == 2:
            supervised.stop.requested = True
        return scores(trial, worker)

    with pytest.raises(StudyInterrupted):
        supervised.run(stopping)
    assert all(worker.ended() == Ended() for worker in supervised.workers)
    assert 2 <= num_finished(supervised.study) < 9
    supervised.stop.requested = False
    supervised.run(scores)
    assert num_finished(supervised.study) == 9


def test_progress_is_reported_from_heartbeats(supervise: Supervise) -> None:
    def report_progress(trial: optuna.Trial, worker: ThreadWorker) -> float:
        rates(trial)
        beat = Beat(count=1, progress=Progress(2, 3, 7, 5.0), measured_epoch=1)
        digest = supervised.search.recipe(trial.params).digest()
        update_attributes(trial.study, trial, recipe_digest=digest, heartbeat=beat)
        time.sleep(0.2)
        return 0.5

    supervised = supervise(1)
    supervised.run(report_progress)
    assert (0, Progress(2, 3, 7, 5.0)) in supervised.observer.steps


def test_trial_that_was_read_while_it_was_written_is_reported_with_its_parameters(supervise: Supervise) -> None:
    """Optuna reads parameters and attributes one after the other: the attributes alone were shown as the control."""
    supervised = supervise(3)
    context = supervised.harness.context(supervised.search, supervised.observer)
    reporter = _StudyReporter(context, supervised.study, Allowance(supervised.search, supervised.study))
    supervised.study.ask()  # the control
    trial = supervised.study.ask()
    rates(trial)
    digest = supervised.search.recipe(trial.params).digest()
    update_attributes(supervised.study, trial, recipe_digest=digest, run_key="a" * 32)
    whole = supervised.study.get_trials()[trial.number]
    torn = copy.copy(whole)
    torn.params, torn.distributions = {}, {}
    reporter.report([torn])
    assert not supervised.observer.started
    for _ in range(2):
        reporter.report([whole])
    assert supervised.observer.started == [(trial.number, trial.params)]
