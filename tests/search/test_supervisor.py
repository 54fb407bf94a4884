"""What the supervisor decides; its workers are threads of this process that take trials of the real store."""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState, create_trial

from pipeline.data.prepare import TrainingData
from pipeline.errors import DataError, UserError
from pipeline.experiment import Outcome
from pipeline.processes import StopOnSignal, this_process
from pipeline.recipe import Recipe
from pipeline.search import supervisor
from pipeline.search.requeue import mark_failed
from pipeline.search.storage import StudyLock, num_finished, open_storage, open_study
from pipeline.search.study import Search, Study
from pipeline.search.supervisor import Supervisor, WorkerBug, _HeartbeatMonitor, placements
from pipeline.search.trial import Progress, StudyInterrupted
from pipeline.search.worker import Assignment, Ended, Limits, claim_trial
from pipeline.tracking.tags import State
from pipeline.tracking.tracker import MlflowTracker


class Died(Exception):
    """The worker is gone, and told nobody."""


class ThreadWorker:
    """`does(trial, worker)` is what it does with a trial: the score, or Died."""

    def __init__(self, home: Path, key: str, does: Callable[[optuna.Trial, "ThreadWorker"], float], launch: int):
        self.id = f"worker {launch}"
        self.stopped = threading.Event()
        self._how: Ended | None = None
        self._storage = open_storage(home)
        self._study = optuna.load_study(study_name=key, storage=self._storage)
        self._does = does
        threading.Thread(target=self._run, daemon=True).start()

    def ended(self) -> Ended | None:
        return self._how

    def stop(self) -> None:
        self.stopped.set()

    def kill(self) -> None:
        self.stopped.set()
        self._how = self._how or Ended(died="killed")

    def _run(self) -> None:
        how = Ended()
        try:
            while not self.stopped.is_set():
                if trial := claim_trial(self._study, self._storage, this_process() | {"id": self.id}):
                    self._study.tell(trial, self._does(trial, self))
                else:
                    time.sleep(0.02)
        except Died as error:
            how = Ended(died=str(error) or "of nothing")
        except UserError as error:
            how = Ended(error=type(error).__name__, problems=[asdict(problem) for problem in error.problems])
        except ZeroDivisionError as error:
            how = Ended(bug=f"Traceback: {error!r}")
        except ValueError:
            how = Ended()  # it was killed
        self._how = self._how or how


class Seen:
    """An Observer that remembers."""

    def __init__(self) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self.steps: list[tuple[int, Progress]] = []

    def trial_ended(self, number: int, outcome: Outcome) -> None:
        self.outcomes[number] = outcome

    def step(self, number: int, progress: Progress) -> None:
        self.steps.append((number, progress))

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *what: None


class Firm:
    """A study, and the supervisor of its thread workers."""

    def __init__(self, home: Path, base: Recipe, data: TrainingData, trials: int, **limits: Any):
        study = Study(question="?", base=base, space=rates, objective="val/accuracy", trials=trials)
        self.search = Search("firm", study, {}, 1, trials, limits.get("timeout_s"), limits.get("patience"))
        self.home, self.key = home, self.search.key(data)
        self.storage, self.tracker = open_storage(home), MlflowTracker(home)
        self.study = open_study(self.search, data, self.storage, home)
        self.parent = self.tracker.open_study(self.key, "?", "val/accuracy", []).id
        self.stop, self.seen = StopOnSignal(), Seen()
        self.workers: list[ThreadWorker] = []

    def run(
        self,
        does: Callable[[optuna.Trial, ThreadWorker], float],
        workers: int = 2,
        limits: Limits | None = None,
        start: Callable[[int, int], Any] | None = None,
    ) -> None:
        def own(place: int, launch: int) -> ThreadWorker:
            self.workers.append(ThreadWorker(self.home, self.key, does, launch))
            return self.workers[-1]

        Supervisor(
            search=self.search,
            study=self.study,
            storage=self.storage,
            tracker=self.tracker,
            parent=self.parent,
            observer=self.seen,
            crew=Hands(start or own, workers, limits or Limits()),
            assign=self.assignment,
            stop=self.stop,
            lock=StudyLock(self.storage, self.key),
        ).run()

    def assignment(self, launch: int) -> Assignment:
        places = {"home": self.home, "data_dir": self.home}
        return Assignment(search=b"", storage="", tracking_uri="", parent=self.parent, ordinal=launch, **places)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(states=states or None)


@dataclass
class Hands:
    """A crew; `starts(place, launch)` starts a worker."""

    starts: Callable[[int, int], Any]
    workers: int
    limits: Limits
    data_dir: Path = Path()

    def room(self) -> int:
        return self.workers

    def start(self, assignment: Assignment, place: int) -> Any:
        return self.starts(place, assignment.ordinal)


def rates(trial: Any) -> None:
    trial.suggest_float("optimizer.lr", 1e-3, 1, log=True)


def scores(trial: optuna.Trial, worker: ThreadWorker) -> float:
    rates(trial)
    time.sleep(random.random() / 100)
    return trial.params["optimizer.lr"]


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "TICK_S", 0.02)


@pytest.fixture
def firm(tmp_path: Path, small_recipe: Recipe, digits: TrainingData) -> Callable[..., Firm]:
    return lambda trials, **limits: Firm(tmp_path / "mlruns", small_recipe, digits, trials, **limits)


def test_many_workers_keep_the_budget_exactly(firm: Callable[..., Firm]) -> None:
    one = firm(25)
    one.run(scores, workers=5)
    assert [trial.state for trial in one.trials()] == [TrialState.COMPLETE] * 25
    owners = {trial.user_attrs["worker"]["id"] for trial in one.trials()}
    assert len(owners) > 1 and len(one.workers) == 5
    assert set(one.seen.outcomes) == set(range(25))
    again = Firm(one.home, one.search.base, one_data(one), 27)
    again.run(scores, workers=5)
    assert len(again.trials()) == 27 and len(again.workers) == 2, "no more workers than trials"


def one_data(firm: Firm) -> TrainingData:
    from pipeline.data.datasets import load
    from pipeline.data.prepare import prepare

    return prepare(load("digits", 8, Path("data")), firm.search.base.data, torch.device("cpu"))


def test_a_trial_that_kills_its_worker_is_tried_three_times_and_then_fails_and_counts(
    firm: Callable[..., Firm],
) -> None:
    def deadly(trial: optuna.Trial, worker: ThreadWorker) -> float:
        rates(trial)
        if trial.user_attrs.get("control"):
            trial.set_user_attr("run_key", trial.user_attrs.get("run_key", "c" * 32))
            trial.report(0.5, 1)
            raise Died("by SIGKILL")
        return scores(trial, worker)

    one = firm(4)
    state = one.home / "checkpoints" / ("c" * 32)
    (state / "epoch-000001").mkdir(parents=True)
    one.run(deadly)
    assert not state.exists(), "nobody goes on from there"
    dead = one.trials(TrialState.FAIL)
    assert [trial.user_attrs.get("deaths", 0) for trial in dead] == [0, 1, 2]
    assert [trial.user_attrs.get("asked_again", False) for trial in dead] == [True, True, False]
    assert {trial.user_attrs["run_key"] for trial in dead} == {"c" * 32}
    assert all(trial.user_attrs["control"] for trial in dead)
    assert [trial.user_attrs.get("retry_of") for trial in dead][1:] == [trial.number for trial in dead][:2]
    assert all(trial.params == dead[0].params and trial.intermediate_values == {1: 0.5} for trial in dead)
    assert dead[2].user_attrs["reason"] == "by SIGKILL; so it ended 3 times"
    assert num_finished(one.study) == 4 and len(one.trials()) == 6
    assert one.seen.outcomes[dead[0].number].reason == "asked again"
    assert one.seen.outcomes[dead[2].number].state == State.FAILED
    run = one.tracker.client.get_run(one.tracker.id_of("c" * 32))
    assert (run.info.status, run.data.tags["trial"]) == ("FAILED", str(dead[2].number))
    assert run.data.tags["reason"] == dead[2].user_attrs["reason"]


def test_a_trial_that_died_while_it_was_asked_again_for_a_stop_has_a_successor_whatever_was_before(
    firm: Callable[..., Firm],
) -> None:
    one = firm(1)
    trial = one.study.ask()
    trial.set_user_attr("deaths", 2)
    trial.set_user_attr("asked_again", True)
    mark_failed(one.study, one.trials(TrialState.RUNNING), "gone", one.tracker, one.parent)
    (queued,) = [each for each in one.trials(TrialState.WAITING) if each.user_attrs.get("retry_of") == trial.number]
    assert queued.user_attrs["deaths"] == 2


def test_a_trial_whose_workers_die_before_it_has_a_run_has_one_in_the_end(firm: Callable[..., Firm]) -> None:
    def deadly(trial: optuna.Trial, worker: ThreadWorker) -> float:
        if trial.user_attrs.get("control"):
            raise Died("at once")
        return scores(trial, worker)

    one = firm(3)
    one.run(deadly)
    (failed,) = [trial for trial in one.trials(TrialState.FAIL) if not trial.user_attrs.get("asked_again")]
    run = one.tracker.client.get_run(one.tracker.id_of(failed.user_attrs["run_key"]))
    assert (run.info.status, run.data.tags["trial"]) == ("FAILED", str(failed.number))


def test_a_worker_that_never_gets_anywhere_stops_the_study(firm: Callable[..., Firm]) -> None:
    class Stillborn:
        id = "x"

        def ended(self) -> Ended:
            return Ended(died="its process ended with 1")

        def stop(self) -> None: ...

        kill = stop

    launches: list[int] = []

    def start(place: int, launch: int) -> Stillborn:
        launches.append(launch)
        return Stillborn()

    one = firm(4)
    with pytest.raises(UserError, match=r"died 3 times in a row and no trial ended .its process ended with 1"):
        one.run(scores, workers=1, start=start)
    assert launches == [1, 2, 3]


@pytest.mark.parametrize(
    ("error", "seen"), [(ZeroDivisionError("ours"), WorkerBug), (DataError("no images"), DataError)]
)
def test_a_bug_in_one_worker_stops_all_at_once(error: Exception, seen: Any, firm: Callable[..., Firm]) -> None:
    def buggy(trial: optuna.Trial, worker: ThreadWorker) -> float:
        if trial.number == 1:
            raise error
        worker.stopped.wait()
        raise Died

    one = firm(9)
    with pytest.raises(seen, match=r"ours|no images"):
        one.run(buggy, workers=3)
    assert not one.trials(TrialState.RUNNING), "what the others did is asked again"
    assert all(trial.user_attrs["asked_again"] for trial in one.trials(TrialState.FAIL))
    assert num_finished(one.study) == 0
    assert not any(trial.user_attrs.get("deaths") for trial in one.trials()), "to be stopped is no death"


def test_a_worker_without_a_beat_is_killed_and_its_trial_done_by_another(firm: Callable[..., Firm]) -> None:
    def once_stuck(trial: optuna.Trial, worker: ThreadWorker) -> float:
        rates(trial)
        for beat in range(1 if trial.number == 0 else 8):
            trial.set_user_attr("pulse", {"beat": beat, "measured": 0, "steps": 0})
            time.sleep(0.1)
        if trial.number == 0:
            worker.stopped.wait()
            raise Died  # a killed process tells nobody
        return scores(trial, worker)

    one = firm(3)
    one.run(once_stuck, limits=Limits(grace_s=0.5))
    (stuck,) = one.trials(TrialState.FAIL)
    assert stuck.number == 0 and stuck.user_attrs["asked_again"]
    assert num_finished(one.study) == 3
    assert sum(worker.ended() == Ended(died="killed") for worker in one.workers) == 1


def test_a_beat_is_missed_only_while_the_database_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: clock[0])

    def running(beat: int) -> list[FrozenTrial]:
        return [create_trial(state=TrialState.WAITING, user_attrs={"pulse": {"beat": beat}})]

    judge = _HeartbeatMonitor(grace_s=10)
    number = running(1)[0].number
    assert not judge.still(running(1))
    for clock[0] in (3.0, 6.0, 9.0):
        assert not judge.still(running(1))
    clock[0] = 900.0  # an outage of the database, or we were paused ourselves
    assert not judge.still(running(1))
    clock[0] = 901.5
    assert judge.still(running(1)) == {number}
    assert not judge.still(running(2)), "it beats again"


def test_after_the_timeout_nothing_more_may_be_taken(firm: Callable[..., Firm]) -> None:
    one = firm(1000, timeout_s=0.5)
    one.run(scores)
    assert not one.trials(TrialState.RUNNING)
    assert 1 < num_finished(one.study) < 1000
    assert not one.storage.granted(one.study._study_id)


def test_patience_ends_a_study_of_many_workers(firm: Callable[..., Firm]) -> None:
    one = firm(1000, patience=5)
    one.run(lambda trial, worker: 0.5, workers=3)
    assert 6 <= num_finished(one.study) <= 6 + 2 * 3, "what ran, and what had been granted"


def test_a_stop_ends_all_workers_and_what_waited_still_waits(firm: Callable[..., Firm]) -> None:
    one = firm(9)

    def stopping(trial: optuna.Trial, worker: ThreadWorker) -> float:
        if trial.number == 2:
            one.stop.requested = True
        return scores(trial, worker)

    with pytest.raises(StudyInterrupted):
        one.run(stopping)
    assert all(worker.ended() == Ended() for worker in one.workers)
    assert 2 <= num_finished(one.study) < 9
    one.stop.requested = False
    one.run(scores)
    assert num_finished(one.study) == 9


def test_progress_is_told_from_the_beats(firm: Callable[..., Firm]) -> None:
    def beating(trial: optuna.Trial, worker: ThreadWorker) -> float:
        rates(trial)
        trial.set_user_attr("recipe_digest", "x")
        beat = {"beat": 1, "epoch": 2, "step": 3, "steps": 7, "images_per_s": 5.0, "measured": 1, "metrics": {}}
        trial.set_user_attr("pulse", beat)
        time.sleep(0.2)
        return 0.5

    one = firm(1)
    one.run(beating)
    assert (0, Progress(2, 3, 7, 5.0)) in one.seen.steps


def test_gpus_are_shared_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert placements(torch.device("cpu"), 2) == [("cpu", None)] * 2
    assert placements(torch.device("cuda"), 2) == [("cuda:0", None), ("cuda:1", None)]
    assert placements(torch.device("cuda"), 3) == [("cuda:0", 1 / 2), ("cuda:1", None), ("cuda:0", 1 / 2)]
    assert placements(torch.device("cuda:1"), 2) == [("cuda:1", 1 / 2)] * 2
