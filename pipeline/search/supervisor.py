"""Many workers for one study: releases trials, starts workers, finds those that died, and shows the study to an observer."""

import contextlib
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError

from pipeline.errors import UserError
from pipeline.experiment import Outcome
from pipeline.processes import StopOnSignal, kill_process, process_has_exited
from pipeline.search.budget import Allowance
from pipeline.search.progress import study_progress
from pipeline.search.requeue import mark_failed, release_trials
from pipeline.search.study_lock import StudyLock
from pipeline.search.trial import StudyContext, StudyInterrupted
from pipeline.search.trial_attributes import TrialAttributes, counts_toward_budget
from pipeline.search.worker import Assignment
from pipeline.search.worker_pool import Worker, WorkerPool
from pipeline.tracking.tracker import State
from pipeline.training.loop import EpochReport
from pipeline.worker_process import WorkerBug

TICK_S = 0.25
MAX_GAP_S = 5.0  # between two answers of the database; a longer gap was an outage, or our own pause
LOCK_CHECK_S = 5.0
END_S = 15.0  # for idle workers to end by themselves
MAX_WORKER_DEATHS = 3  # in a row, while no trial of the study ended: another start would not help

log = logging.getLogger(__name__)


@dataclass
class _Slot:
    """Room for one worker at a time, and for another after it if it dies."""

    number: int
    worker: Worker | None = None
    deaths: int = 0  # in a row
    finished_at_start: int = 0  # trials of the study, when its last worker started


@dataclass
class Supervisor:
    """Runs a study with many workers until its trials are done. The pool starts them, each with its own assignment.

    Only the supervisor declares a worker dead, by its own clock: at once where its process has exited, otherwise after
    `heartbeat_timeout_s` without a heartbeat while the database answered. It need not be the parent of a worker, nor on
    the same machine.
    """

    context: StudyContext
    study: optuna.Study
    pool: WorkerPool
    assign: Callable[[int], Assignment]  # of a launch, from 1
    stop: StopOnSignal
    lock: StudyLock
    allowance: Allowance
    _slots: list[_Slot] = field(default_factory=list)
    _launches: int = 0

    def run(self) -> None:
        """Until the budget, the time or the patience is used up and nothing runs any more.

        Raises StudyInterrupted where the user asked to stop; WorkerBug, or the UserError of a worker: all other workers are
        stopped first, and their trials are requeued.
        """
        self._monitor = _HeartbeatMonitor(self.pool.limits.heartbeat_timeout_s)
        self._reporter = _StudyReporter(self.context, self.study, self.allowance)
        storage = self.context.storage
        storage.while_waiting = self._check_stop
        self._lock_checked = time.monotonic()
        try:
            while self._tick():
                time.sleep(TICK_S)
            self._end_workers(END_S)
        except StudyInterrupted:
            self._end_workers(self.pool.limits.term_s if self.stop.number == signal.SIGTERM else None)
            raise
        except KeyboardInterrupt:  # the second Ctrl-C: at once
            self._end_workers(0)
            raise
        except BaseException:
            self._end_workers(self.pool.limits.term_s)
            raise
        finally:
            del storage.while_waiting
            with storage.without_retries(), contextlib.suppress(StorageInternalError, DBAPIError):
                self._reporter.report(self.study.get_trials(deepcopy=False))

    def _tick(self) -> bool:
        """Look at workers and trials once and do what follows; False where nothing is left to do."""
        self._check_stop()
        if time.monotonic() - self._lock_checked > LOCK_CHECK_S:
            self.lock.check()
            self._lock_checked = time.monotonic()
        dead_slots = self._dead_slots()
        trials = self.study.get_trials(deepcopy=False)
        running = [trial for trial in trials if trial.state is TrialState.RUNNING]
        if failed := self._mark_dead_failed(running, dead_slots):
            trials = self.study.get_trials(deepcopy=False)
            running = [trial for trial in trials if trial.state is TrialState.RUNNING and trial.number not in failed]
        self._reporter.report(trials)
        finished = sum(counts_toward_budget(trial) for trial in trials)
        remaining = self.allowance.remaining(trials, finished + len(running))
        if not remaining and not running:
            release_trials(self.study, self.context.search, trials, 0, 0)
            return False
        for slot in dead_slots:
            self._note_death(slot, finished)
        capacity = self.pool.capacity()
        self._start_workers(remaining + len(running), finished, capacity)
        count = min(remaining - self._holds_last(running, remaining), capacity - self._busy(running))
        release_trials(self.study, self.context.search, trials, count, remaining)
        return True

    def _busy(self, running: list[FrozenTrial]) -> int:
        """How many of our workers train: what is next for them, a short trial or one in full, depends on what they get."""
        ours = {slot.worker.id for slot in self._slots if slot.worker}
        return sum(TrialAttributes.of(trial).worker_id in ours for trial in running)

    def _holds_last(self, running: list[FrozenTrial], remaining: int) -> bool:
        """Whether the last trial is held back: it is for the best short trial's recipe, and short ones are still to end."""
        is_short_left = remaining > 1 or any(TrialAttributes.of(trial).short for trial in running)
        return self.context.search.shortens and remaining > 0 and is_short_left

    def _check_stop(self) -> None:
        if self.stop.requested:
            raise StudyInterrupted

    def _dead_slots(self) -> list[_Slot]:
        """Slots whose worker died. What has to stop the study is raised."""
        dead = []
        for slot in self._slots:
            ended = slot.worker.ended() if slot.worker else None
            if ended is None:
                continue
            if ended.bug:
                raise WorkerBug(f"in worker {slot.number + 1}:\n{ended.bug}")
            if ended.error:
                raise ended.error
            dead.append(slot)
        return dead

    def _note_death(self, slot: _Slot, finished: int) -> None:
        cause = _cause_of_death(slot)
        slot.deaths = 1 if finished > slot.finished_at_start else slot.deaths + 1
        slot.worker = None
        log.info("worker %d: %s", slot.number + 1, cause)
        if slot.deaths >= MAX_WORKER_DEATHS:
            raise UserError(
                f"worker {slot.number + 1}",
                f"died {MAX_WORKER_DEATHS} times in a row and no trial ended ({cause})",
                "remove the cause; the same command resumes the study",
            )

    def _mark_dead_failed(self, running: list[FrozenTrial], dead_slots: list[_Slot]) -> set[int]:
        """Declare dead the trials whose process has exited or sends no heartbeat; their numbers."""
        causes = {slot.worker.id: _cause_of_death(slot) for slot in dead_slots if slot.worker}
        workers = {slot.worker.id: slot.worker for slot in self._slots if slot.worker}
        silent = self._monitor.silent(running)
        dead: dict[str, list[FrozenTrial]] = {}  # by cause
        for trial in running:
            owner = TrialAttributes.of(trial).worker
            worker_id = str(owner.get("id")) if owner else ""
            worker = workers.get(worker_id)
            if worker_id in causes:
                dead.setdefault(causes[worker_id], []).append(trial)
            elif worker is None and owner and process_has_exited(owner):
                dead.setdefault("its process has exited", []).append(trial)
            elif trial.number in silent:
                # A paused or hung worker may wake up: it is killed before its trial is given to another.
                if worker:
                    worker.kill()
                elif owner:
                    kill_process(owner)
                cause = f"its worker sent no heartbeat for {self.pool.limits.heartbeat_timeout_s:.0f} s"
                dead.setdefault(cause, []).append(trial)
        for cause, trials in dead.items():
            mark_failed(self.study, trials, cause, self.context.tracker, self.context.parent_run)
        return {trial.number for trials in dead.values() for trial in trials}

    def _start_workers(self, trials: int, finished: int, capacity: int) -> None:
        """As many as are needed to run all these trials at once, up to the capacity."""
        self._slots += [_Slot(number) for number in range(len(self._slots), capacity)]
        empty = [slot for slot in self._slots if slot.worker is None]
        num_running = len(self._slots) - len(empty)
        for slot in empty[: max(0, min(trials, capacity) - num_running)]:
            self._launches += 1
            slot.worker = self.pool.start(self.assign(self._launches), slot.number)
            slot.finished_at_start = finished

    def _end_workers(self, timeout_s: float | None) -> None:
        """Ask all workers to stop, and kill those that have not within the timeout (None: wait for a second Ctrl-C)."""
        workers = [slot.worker for slot in self._slots if slot.worker]
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
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
            # Where the database is away this is left to the next start.
            with self.context.storage.without_retries(), contextlib.suppress(StorageInternalError, DBAPIError):
                self._requeue_trials_of({worker.id for worker in workers})

    def _requeue_trials_of(self, worker_ids: set[str]) -> None:
        """Requeue what killed workers left RUNNING; that they were killed here is no death that counts."""
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        stopped = [trial for trial in running if TrialAttributes.of(trial).worker_id in worker_ids]
        context = self.context
        mark_failed(self.study, stopped, "stopped", context.tracker, context.parent_run, died=False)


def _cause_of_death(slot: _Slot) -> str:
    ended = slot.worker.ended() if slot.worker else None
    return (ended.died if ended else "") or "it stopped without being asked to"


class _HeartbeatMonitor:
    """Whose heartbeat is missing, by our own clock, counting only the time in which the database answered."""

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._last_read: float | None = None
        self._silence: dict[int, tuple[int, float]] = {}  # trial -> its last heartbeat, and seconds since

    def silent(self, running: list[FrozenTrial]) -> set[int]:
        """Numbers of the running trials without a new heartbeat for the timeout; called right after each answer."""
        now = time.monotonic()
        gap_s = now - self._last_read if self._last_read is not None else 0.0
        self._last_read = now
        elapsed_s = gap_s if gap_s <= MAX_GAP_S else 0.0
        silence = {}
        for trial in running:
            beat = TrialAttributes.of(trial).heartbeat
            count = beat.count if beat else 0
            last_count, seconds = self._silence.get(trial.number, (-1, 0.0))
            silence[trial.number] = (count, seconds + elapsed_s if count == last_count else 0.0)
        self._silence = silence
        return {number for number, (_, seconds) in silence.items() if seconds > self._timeout_s}


class _StudyReporter:
    """Reports all trials to a StudyObserver, as the database has them."""

    def __init__(self, context: StudyContext, study: optuna.Study, allowance: Allowance):
        self._observer, self._search, self._study = context.observer, context.search, study
        self._allowance = allowance
        trials = study.get_trials(deepcopy=False)
        self._ended = {trial.number for trial in trials if trial.state.is_finished()}
        self._epochs: dict[int, int] = {}  # of the trials that were reported: epochs so far
        self._finished: int | None = None

    def report(self, trials: list[FrozenTrial]) -> None:
        """Report what is new."""
        for trial in trials:
            if trial.number in self._ended or trial.state is TrialState.WAITING:
                continue
            attributes = TrialAttributes.of(trial)
            if attributes.unused:
                continue
            if trial.number not in self._epochs and attributes.recipe_digest:
                recipe = self._search.recipe(trial.params)
                recipe = self._search.short(recipe) if attributes.short else recipe
                # Optuna reads parameters before attributes, and these may have been written in between.
                if recipe.digest() == attributes.recipe_digest or trial.state.is_finished():
                    self._epochs[trial.number] = 0
                    self._observer.trial_started(trial.number, recipe, trial.params, attributes.full_of)
            if trial.state.is_finished():
                self._ended.add(trial.number)
                self._observer.trial_ended(trial.number, _outcome(attributes))
            elif trial.number in self._epochs:
                self._report_progress(trial.number, attributes)
        finished = sum(counts_toward_budget(trial) for trial in trials)
        if finished != self._finished:
            self._finished = finished
            started = finished + sum(trial.state is TrialState.RUNNING for trial in trials)
            in_all = self._allowance.total(trials, started)
            self._observer.study_progress(study_progress(self._study, finished, in_all))

    def _report_progress(self, number: int, attributes: TrialAttributes) -> None:
        beat = attributes.heartbeat
        if beat and beat.measured_epoch > self._epochs[number]:
            self._epochs[number] = beat.measured_epoch
            self._observer.epoch(number, EpochReport(beat.measured_epoch, dict(beat.metrics)))
        if beat and beat.progress.steps:
            self._observer.step(number, beat.progress)


def _outcome(attributes: TrialAttributes) -> Outcome:
    default_state = State.INTERRUPTED if attributes.requeued else State.FAILED
    return Outcome(
        state=State(attributes.state or default_state),
        run_key=attributes.run_key or "",
        run_id=attributes.mlflow_run_id,
        reason=attributes.reason or ("requeued" if attributes.requeued else ""),
        metrics=dict(attributes.metrics),
        epochs=attributes.epochs,
        seconds=attributes.seconds,
        notes=attributes.notes,
    )
