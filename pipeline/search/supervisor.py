"""Many workers for one study: what may be taken, who lives, who died, and what a person sees of it."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import cloudpickle
import optuna
import torch
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError

from pipeline.errors import UserError
from pipeline.experiment import Outcome
from pipeline.processes import StopOnSignal, kill_process, process_has_exited
from pipeline.search.requeue import mark_failed
from pipeline.search.storage import RetryingStorage, StudyLock
from pipeline.search.study import Search, counts_toward_budget, study_progress
from pipeline.search.trial import Progress, StudyInterrupted, StudyObserver
from pipeline.search.worker import Assignment, Ended, Limits, release_trials
from pipeline.tracking.tags import State
from pipeline.tracking.tracker import MlflowTracker
from pipeline.training.loop import EpochReport

TICK_S = 0.25
LONGEST_GAP_S = 5.0  # between two answers of the database; what is longer was an outage, or our own pause
LOCK_CHECK_S = 5.0
END_S = 15.0  # for idle workers to end by themselves
# A worker process.
WORKER = "import pipeline.runtime; from pipeline.search.worker import main; main()"
MAX_WORKER_DEATHS = 3  # deaths of a worker in a row, while no trial of the study ended: it will not get better

log = logging.getLogger(__name__)


class WorkerBug(Exception):
    """A bug in a worker, with its traceback."""


class Worker(Protocol):
    """A worker as the supervisor sees it: a process here, or an actor anywhere."""

    id: str  # its assignment's

    def ended(self) -> Ended | None:
        """How it ended; None while it lives."""

    def stop(self) -> None:
        """Ask it to end at its next step."""

    def kill(self) -> None:
        """End it at once; when this returns it does nothing any more, as far as can be known."""


class ProcessWorker:
    """A worker in a fresh interpreter on this machine; see `worker.main`."""

    def __init__(self, assignment: Assignment):
        self.id = assignment.id
        self._ended: Ended | None = None
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if assignment.threads:
            environment["OMP_NUM_THREADS"] = str(assignment.threads)
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C and hang-up are for the supervisor
        )
        words = cloudpickle.dumps(assignment)
        self._send(len(words).to_bytes(8, "big") + words)

    def ended(self) -> Ended | None:
        """See Worker."""
        if self._ended is None and (code := self._process.poll()) is not None:
            assert self._process.stdout and self._process.stdin
            said = self._process.stdout.read()
            for pipe in (self._process.stdout, self._process.stdin):
                with contextlib.suppress(OSError):  # it may have died before it read all
                    pipe.close()
            self._ended = Ended(**json.loads(said)) if said else Ended(died=_of(code))
        return self._ended

    def stop(self) -> None:
        """See Worker."""
        self._send(b"s")

    def kill(self) -> None:
        """See Worker."""
        if self.ended() is None:
            self._process.kill()
            self._process.wait()

    def _send(self, words: bytes) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(words)
            self._process.stdin.flush()
        except (OSError, ValueError):  # it ended, as will be seen
            pass


def _of(code: int) -> str:
    return f"its process was killed by {signal.Signals(-code).name}" if code < 0 else f"its process ended with {code}"


def placements(device: torch.device, workers: int) -> list[tuple[str, float | None]]:
    """(device, share of its memory) of each worker: the GPUs in turn, or the one that is named, or the CPU."""
    if device.type != "cuda":
        return [(str(device), None)] * workers
    gpus = [device.index] if device.index is not None else list(range(torch.cuda.device_count()))
    on = [gpus[worker % len(gpus)] for worker in range(workers)]
    return [(f"cuda:{gpu}", 1 / on.count(gpu) if on.count(gpu) > 1 else None) for gpu in on]


class WorkerPool(Protocol):
    """Where a study's workers work: on this machine, or on a cluster."""

    @property
    def limits(self) -> Limits:
        """By which they are judged."""

    @property
    def data_dir(self) -> Path:
        """Where each reads the images."""

    def room(self) -> int:
        """How many workers there can be now."""

    def start(self, assignment: Assignment, place: int) -> Worker:
        """A worker, its device and threads filled in as they are at its place, from 0."""


@dataclass(frozen=True)
class LocalPool:
    """Workers on this machine."""

    device: torch.device
    workers: int
    data_dir: Path
    limits: Limits = field(default_factory=Limits)

    def room(self) -> int:
        """See Crew."""
        return self.workers

    def start(self, assignment: Assignment, place: int) -> Worker:
        """See Crew."""
        device, share = placements(self.device, self.workers)[place]
        threads = 1 if device == "cpu" and self.workers > 1 else None
        return ProcessWorker(replace(assignment, device=device, memory_fraction=share, threads=threads))


@dataclass
class _Slot:
    """Where a worker works, and another after it if it dies."""

    number: int
    worker: Worker | None = None
    deaths: int = 0  # in a row
    finished: int = 0  # trials of the study, at its last start


@dataclass
class Supervisor:
    """Runs a study with many workers until its trials are done; the crew starts them, each with an assignment of its own.

    Only it declares anybody dead, by its own clock: a process that has ended at once, any other after `grace_s` without
    a beat while the database answered. It need not be the parent of a worker, nor on the same machine.
    """

    search: Search
    study: optuna.Study
    storage: RetryingStorage
    tracker: MlflowTracker
    parent: str
    observer: StudyObserver
    crew: WorkerPool
    assign: Callable[[int], Assignment]  # of a launch, from 1
    stop: StopOnSignal
    lock: StudyLock
    _places: list[_Slot] = field(default_factory=list)
    _launches: int = 0

    def run(self) -> None:
        """Until the budget is spent, the time is up or patience is at its end, and nothing runs any more.

        Raises StudyInterrupted where somebody asked to stop; WorkerBug, or the user's fault, of a worker: all the others
        are stopped first, and what they did is asked again.
        """
        self._judge, self._show = (
            _HeartbeatMonitor(self.crew.limits.grace_s),
            _Show(self.observer, self.search, self.study),
        )
        self.storage.while_waiting = self._interrupt_if_asked
        began = self._lock_checked = time.monotonic()
        try:
            while self._tick(time.monotonic() - began):
                time.sleep(TICK_S)
            self._end_workers(END_S)
        except StudyInterrupted:
            self._end_workers(self.crew.limits.term_s if self.stop.number == signal.SIGTERM else None)
            raise
        except KeyboardInterrupt:  # the second one: at once
            self._end_workers(0)
            raise
        except BaseException:
            self._end_workers(self.crew.limits.term_s)
            raise
        finally:
            del self.storage.while_waiting
            with self.storage.once(), contextlib.suppress(StorageInternalError, DBAPIError):
                self._show.look(self.study.get_trials(deepcopy=False))

    def _tick(self, seconds: float) -> bool:
        """Look at everything once; whether there is more to do."""
        self._interrupt_if_asked()
        if time.monotonic() - self._lock_checked > LOCK_CHECK_S:
            self.lock.check()
            self._lock_checked = time.monotonic()
        ended = self._ended_workers()
        trials = self.study.get_trials(deepcopy=False)
        running = [trial for trial in trials if trial.state is TrialState.RUNNING]
        if buried := self._mark_dead_failed(running, ended):
            trials = self.study.get_trials(deepcopy=False)
            running = [trial for trial in trials if trial.state is TrialState.RUNNING and trial.number not in buried]
        self._show.look(trials)
        finished = sum(counts_toward_budget(trial) for trial in trials)
        left = self.search.trials - finished - len(running)
        if self.search.timeout_s is not None and seconds >= self.search.timeout_s:
            left = 0
        if self.search.is_exhausted(self.study):
            left = 0
        left = max(left, 0)
        if not left and not running:
            release_trials(self.study, trials, 0)
            return False
        for place in ended:
            self._note_death(place, finished)
        room = self.crew.room()
        self._start_workers(left + len(running), finished, room)
        release_trials(self.study, trials, min(left, room))
        return True

    def _interrupt_if_asked(self) -> None:
        if self.stop.requested:
            raise StudyInterrupted

    def _ended_workers(self) -> list[_Slot]:
        """Places whose worker died; what stops a study is raised."""
        died = []
        for place in self._places:
            ended = place.worker.ended() if place.worker else None
            if ended is None:
                continue
            if ended.bug:
                raise WorkerBug(f"in worker {place.number + 1}:\n{ended.bug}")
            if ended.error:
                raise ended.as_error()
            died.append(place)
        return died

    def _note_death(self, place: _Slot, finished: int) -> None:
        why = self._why(place)
        place.deaths = 1 if finished > place.finished else place.deaths + 1
        place.worker = None
        log.info("worker %d: %s", place.number + 1, why)
        if place.deaths >= MAX_WORKER_DEATHS:
            raise UserError(
                f"worker {place.number + 1}",
                f"died {MAX_WORKER_DEATHS} times in a row and no trial ended ({why})",
                "mend what ends it; the same command resumes the study",
            )

    def _why(self, place: _Slot) -> str:
        ended = place.worker.ended() if place.worker else None
        return (ended.died if ended else "") or "it stopped, though nobody asked it to"

    def _mark_dead_failed(self, running: list[FrozenTrial], ended: list[_Slot]) -> set[int]:
        """Declare dead whose process is gone or whose beat stands still; the trials' numbers."""
        died = {place.worker.id: self._why(place) for place in ended if place.worker}
        ours = {place.worker.id: place.worker for place in self._places if place.worker}
        still = self._judge.still(running)
        dead: dict[str, list[FrozenTrial]] = {}
        for trial in running:
            owner = trial.user_attrs.get("worker", {})
            worker = ours.get(owner.get("id"))
            if owner.get("id") in died:
                dead.setdefault(died[owner["id"]], []).append(trial)
            elif worker is None and owner and process_has_exited(owner):
                dead.setdefault("its process is gone", []).append(trial)
            elif trial.number in still:
                why = f"its worker gave no sign of life for {self.crew.limits.grace_s:.0f} s"
                if worker:  # paused or hung, it may wake up: nobody else may have its trial before it is gone
                    worker.kill()
                elif owner:
                    kill_process(owner)
                dead.setdefault(why, []).append(trial)
        for why, trials in dead.items():
            mark_failed(self.study, trials, why, self.tracker, self.parent)
        return {trial.number for trials in dead.values() for trial in trials}

    def _start_workers(self, trials: int, finished: int, room: int) -> None:
        """So many that all these trials can be under way, as far as there is room."""
        self._places += [_Slot(number) for number in range(len(self._places), room)]
        empty = [place for place in self._places if place.worker is None]
        for place in empty[: max(0, min(trials, room) - (len(self._places) - len(empty)))]:
            self._launches += 1
            place.worker = self.crew.start(self.assign(self._launches), place.number)
            place.finished = finished

    def _end_workers(self, seconds: float | None) -> None:
        """Ask all to stop, kill those that have not after so many seconds (None: wait for a second Ctrl-C)."""
        workers = [place.worker for place in self._places if place.worker]
        deadline = None if seconds is None else time.monotonic() + seconds
        try:
            for worker in workers:
                worker.stop()
            while any(worker.ended() is None for worker in workers):
                if deadline is not None and time.monotonic() > deadline:
                    break
                time.sleep(0.05)
        finally:
            for worker in workers:
                worker.kill()
            with self.storage.once(), contextlib.suppress(StorageInternalError, DBAPIError):
                self._mark_stopped_failed({worker.id for worker in workers})

    def _mark_stopped_failed(self, ids: set[str]) -> None:
        """What killed workers left RUNNING is asked again; nobody but us ended it.

        Where the database is away this is left to the next start.
        """
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        left = [trial for trial in running if trial.user_attrs.get("worker", {}).get("id") in ids]
        if left:
            mark_failed(self.study, left, "stopped", self.tracker, self.parent, died=False)


class _HeartbeatMonitor:
    """Whose beat stands still, by our own clock, and only for as long as the database answered."""

    def __init__(self, grace_s: float):
        self._grace_s = grace_s
        self._read: float | None = None
        self._seen: dict[int, tuple[int, float]] = {}  # trial -> its last beat, and seconds since

    def still(self, running: list[FrozenTrial]) -> set[int]:
        """Numbers of the running trials without a new beat for `grace_s`; called right after each answer."""
        now = time.monotonic()
        gap = now - self._read if self._read is not None else 0.0
        self._read = now
        passed = gap if gap <= LONGEST_GAP_S else 0.0
        seen = {}
        for trial in running:
            beat = trial.user_attrs.get("pulse", {}).get("beat", 0)
            before, seconds = self._seen.get(trial.number, (-1, 0.0))
            seen[trial.number] = (beat, seconds + passed if beat == before else 0.0)
        self._seen = seen
        return {number for number, (_, seconds) in seen.items() if seconds > self._grace_s}


class _Show:
    """Tells an Observer of all trials, as the database has them."""

    def __init__(self, observer: StudyObserver, search: Search, study: optuna.Study):
        self._observer, self._search, self._study = observer, search, study
        trials = study.get_trials(deepcopy=False)
        self._ended = {trial.number for trial in trials if trial.state.is_finished()}
        self._measured: dict[int, int] = {}  # of the trials that were shown: epochs so far
        self._finished: int | None = None

    def look(self, trials: list[FrozenTrial]) -> None:
        """Tell what is new."""
        for trial in trials:
            if trial.number in self._ended or trial.state is TrialState.WAITING:
                continue
            if trial.number not in self._measured and "recipe_digest" in trial.user_attrs:
                self._measured[trial.number] = 0
                self._observer.trial_started(trial.number, self._search.recipe(trial.params), trial.params)
            if trial.state.is_finished():
                self._ended.add(trial.number)
                self._observer.trial_ended(trial.number, _outcome(trial))
            elif trial.number in self._measured:
                self._look_at(trial)
        finished = sum(counts_toward_budget(trial) for trial in trials)
        if finished != self._finished:
            self._finished = finished
            self._observer.study_progress(study_progress(self._study, finished))

    def _look_at(self, trial: FrozenTrial) -> None:
        beat: Mapping[str, Any] = trial.user_attrs.get("pulse", {})
        if beat and beat["measured"] > self._measured[trial.number]:
            self._measured[trial.number] = beat["measured"]
            self._observer.epoch(trial.number, EpochReport(beat["measured"], beat["metrics"]))
        if beat and beat["steps"]:
            progress = {name: beat[name] for name in ("epoch", "step", "steps", "images_per_s")}
            self._observer.step(trial.number, Progress(**progress))


def _outcome(trial: FrozenTrial) -> Outcome:
    known = trial.user_attrs
    again = "asked again" if known.get("asked_again") else ""
    return Outcome(
        state=State(known.get("state", State.INTERRUPTED if again else State.FAILED)),
        run_key=known.get("run_key", ""),
        run_id=known.get("mlflow_run_id"),
        reason=known.get("reason") or again,
        metrics=known.get("metrics", {}),
        epochs=known.get("epochs", 0),
        seconds=known.get("seconds", 0.0),
        notes=tuple(known.get("notes", ())),
    )
