"""One worker: takes trials that wait, runs them, and tells that it lives; in this process, one of its own, or elsewhere."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import cloudpickle
import optuna
import torch
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from pipeline.data.datasets import load
from pipeline.data.prepare import prepare
from pipeline.errors import Problem, UserError, error_of
from pipeline.experiment import Interrupted, Outcome
from pipeline.processes import this_process
from pipeline.recipe import Recipe
from pipeline.runtime import freeze_imports
from pipeline.search.storage import RetryingStorage, find_study, open_storage
from pipeline.search.study import Search, StudyProgress
from pipeline.search.trial import Objective, Progress, StudyInterrupted, TrialFailed
from pipeline.tracking.tracker import MlflowTracker, OwnershipLost
from pipeline.training.execution import check_execution
from pipeline.training.loop import EpochReport

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0  # of a worker for whom no trial waits
FLUSH_S = 3.0  # for a worker that ends, until MLflow has all that it measured
HUNG = 75  # the exit code of a process that ended itself


@dataclass(frozen=True)
class Limits:
    """Times in seconds by which the living are told from the dead."""

    beat_s: float = 5.0  # between a worker's signs of life
    grace_s: float = 60.0  # without one, while the database answers, a worker is dead
    hang_s: float = 900.0  # without a step or an epoch a training hangs
    term_s: float = 7.0  # from SIGTERM until workers that have not stopped are killed; systems kill after 10


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """All that a worker needs to know, wherever it runs; plain values, so that anything can carry it."""

    search: bytes  # see `packed`
    storage: str = field(repr=False)  # addresses may hold passwords
    tracking_uri: str = field(repr=False)
    home: Path
    data_dir: Path
    device: str = "cpu"
    memory_fraction: float | None = None  # of the GPU; None: all of it
    threads: int | None = None  # of torch on the CPU; None: its choice
    parent: str  # the study's run
    ordinal: int = 0  # of the launch, from 1; seeds the sampler
    limits: Limits = field(default_factory=Limits)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class Ended:
    """How a worker ended: because it was asked to, by a UserError, by a bug, or it `died`; JSON."""

    error: str = ""  # the name of the UserError's class
    problems: list[dict[str, Any]] = field(default_factory=list)  # of the UserError; see `as_error`
    bug: str = ""  # a traceback
    died: str = ""  # of what

    def as_error(self) -> UserError:
        """The UserError that ended it."""
        problems = [Problem(**problem | {"details": tuple(problem["details"])}) for problem in self.problems]
        return error_of(self.error, problems)


def packed(search: Search) -> bytes:
    """A search for another process. Its space is code: a function of a module in studies/, or of a script.

    No name would find it there, as that module was loaded from its file; so its code goes with it, by cloudpickle. Only
    a worker that this command started reads it, from a pipe that nobody else writes.
    """
    module = sys.modules.get(search.study.space.__module__)
    by_value = module is not None and not module.__name__.startswith("pipeline.")
    if by_value:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(search)
    finally:
        if by_value:
            cloudpickle.unregister_pickle_by_value(module)


def release_trials(study: optuna.Study, trials: list[FrozenTrial], wanted: int) -> None:
    """Let workers take so many of the trials that wait, the oldest first, and make new ones where they don't suffice.

    Workers take what is granted and make none themselves; so the budget is kept exactly, however many they are, if
    `wanted` was counted among the same `trials`: one that is taken meanwhile was granted before.
    """
    waiting = [trial for trial in trials if trial.state is TrialState.WAITING]
    for place, trial in enumerate(waiting):
        if bool(trial.user_attrs.get("granted")) != (place < wanted):
            with contextlib.suppress(UpdateFinishedTrialError):
                study._storage.set_trial_user_attr(trial._trial_id, "granted", place < wanted)
    for _ in range(wanted - len(waiting)):
        study.enqueue_trial({}, user_attrs={"granted": True})


def claim_trial(study: optuna.Study, storage: RetryingStorage, worker: Mapping[str, Any]) -> optuna.Trial | None:
    """A granted trial, now this worker's; None where there is none. `study.ask` would make one."""
    for trial_id in storage.granted(study._study_id):
        if storage.claim(trial_id, worker):
            # As `study.ask` does: the sampler is to see all that is known by now, and the trial is to be among it.
            study._thread_local.cached_all_trials = None
            study.get_trials(deepcopy=False)
            return optuna.Trial(study, trial_id)
    return None


def run_trial(study: optuna.Study, trial: optuna.Trial, objective: Objective) -> None:
    """Run a trial and tell Optuna how it ended, as `study.optimize` does; raises what stops a study."""
    state: TrialState | None = None
    value: float | None = None
    stops: BaseException | None = None
    try:
        value = objective(trial)
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except TrialFailed:
        state = TrialState.FAIL
    except OwnershipLost:
        return
    except BaseException as error:
        state, stops = TrialState.FAIL, error
    try:
        study.tell(trial, value, state)
    except (ValueError, UpdateFinishedTrialError):
        if objective.storage.state_of(trial._trial_id) is TrialState.RUNNING:
            raise
        # else it was declared dead meanwhile, and another does it again
    if stops:
        raise stops


class Heartbeat:
    """Tells the database every few seconds that a worker lives and how far its trial is; an Observer of its trials.

    The supervisor judges by the beats alone. A database that is away stops no pulse. It ends the process where a training
    hangs, or does not stop in time when it was asked to: a hung thread can't be stopped otherwise.
    """

    def __init__(self, storage: RetryingStorage, limits: Limits, stop_requested: Callable[[], bool]):
        self._storage, self._limits, self._stop_requested = storage, limits, stop_requested
        self._trial: optuna.Trial | None = None
        self._is_lost = False
        self._beat = 0
        self._stop_seen: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="pulse")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()

    @contextlib.contextmanager
    def of(self, trial: optuna.Trial) -> Iterator[None]:
        """Beat for this trial while the block runs."""
        self._progress, self._measured = Progress(), EpochReport(0, {})
        self.moved()
        self._is_lost, self._trial = False, trial
        try:
            yield
        finally:
            self._trial = None

    def moved(self) -> None:
        """The worker does something, or knows what it waits for."""
        self._moved = time.monotonic()

    def planned(self, forecast: Mapping[str, Any]) -> None:
        """See Observer."""

    def study_progress(self, progress: StudyProgress) -> None:
        """See Observer."""

    def trial_started(self, number: int, recipe: Recipe, params: Mapping[str, Any]) -> None:
        """See Observer."""

    def step(self, number: int, progress: Progress) -> None:
        """See Observer. Raises Lost where the trial is known to have been declared dead."""
        if self._is_lost:
            raise OwnershipLost
        self._progress = progress
        self.moved()

    def epoch(self, number: int, report: EpochReport) -> None:
        """See Observer."""
        self._measured = report
        self.moved()

    def trial_ended(self, number: int, outcome: Outcome) -> None:
        """See Observer."""

    def _run(self) -> None:
        while not self._over.wait(self._limits.beat_s):
            trial = self._trial
            self._watch(trial)
            if trial is None:
                continue
            self._beat += 1
            beat = {"beat": self._beat, **asdict(self._progress)}
            beat |= {"measured": self._measured.epoch, "metrics": self._measured.metrics}
            try:
                with self._storage.once():
                    self._storage.set_trial_user_attr(trial._trial_id, "pulse", beat)
            except UpdateFinishedTrialError:
                self._is_lost = self._trial is trial
            except Exception:  # whatever a driver raises while its database is away; the next beat may reach it
                continue

    def _watch(self, trial: optuna.Trial | None) -> None:
        now = time.monotonic()
        if trial is not None and now - self._moved > self._limits.hang_s:
            _end_process(f"trial {trial.number}: no step for {self._limits.hang_s:.0f} s; its process ends")
        if self._stop_requested():
            self._stop_seen = self._stop_seen or now
            if now - self._stop_seen > self._limits.grace_s:
                _end_process("a worker did not stop when it was asked to; its process ends")


def _end_process(line: str) -> None:
    os.write(2, f"{line}\n".encode())
    os._exit(HUNG)


def work(assignment: Assignment, stop_requested: Callable[[], bool]) -> Ended:
    """Run trials until `stop_requested`, also in the middle of one, which is then asked again; how it ended.

    The main part of a worker process, or of any other actor: it raises nothing.
    """
    try:
        _work(assignment, cloudpickle.loads(assignment.search), stop_requested)
    except (StudyInterrupted, Interrupted, KeyboardInterrupt):
        return Ended()
    except UserError as error:
        return Ended(error=type(error).__name__, problems=[asdict(problem) for problem in error.problems])
    except BaseException:
        return Ended(bug=traceback.format_exc())
    return Ended()


def _work(assignment: Assignment, search: Search, stop_requested: Callable[[], bool]) -> None:
    device = torch.device(assignment.device)
    if assignment.threads:
        torch.set_num_threads(assignment.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if assignment.memory_fraction:
            torch.cuda.set_per_process_memory_fraction(assignment.memory_fraction, device)
    for recipe in search.executed():
        check_execution(recipe, device)
    images = load(search.lies_at or search.base.data.dataset, search.base.data.image_size, assignment.data_dir)
    data = prepare(images, search.base.data, device)
    freeze_imports()
    tracker = MlflowTracker(assignment.home, assignment.tracking_uri, connect_now=False)
    storage = open_storage(assignment.home, assignment.storage, wait=True)
    study = find_study(search, data, storage)  # refuses data that is not the study's
    assert study is not None, "the supervisor made it"
    study.pruner = search.pruner()
    study.sampler = search.sampler(len(study.get_trials(deepcopy=False)), assignment.ordinal)
    worker = this_process() | {"id": assignment.id, "ordinal": assignment.ordinal}
    pause_s = SHORTEST_PAUSE_S
    with Heartbeat(storage, assignment.limits, stop_requested) as pulse:

        def while_waiting() -> None:
            pulse.moved()
            if stop_requested():
                raise StudyInterrupted

        storage.while_waiting = while_waiting
        objective = Objective(
            search, data, device, tracker, assignment.parent, pulse, stop_requested, storage, assignment.home
        )
        try:
            while not stop_requested():
                if trial := claim_trial(study, storage, worker):
                    with pulse.of(trial):
                        run_trial(study, trial, objective)
                    pause_s = SHORTEST_PAUSE_S
                else:
                    time.sleep(pause_s)
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        finally:
            tracker.flush(FLUSH_S)  # what is left waits on disk, for the supervisor


def main() -> None:
    """A worker process: `Assignment` comes by stdin, which stays open as long as the supervisor lives; `Ended` goes to stdout.

    A byte on stdin, or its end, asks it to stop. The terminal's signals are the supervisor's.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    told = os.dup(1)
    os.dup2(2, 1)  # what a library prints isn't the answer
    with open(0, "rb", buffering=0, closefd=False) as pipe:
        size = int.from_bytes(pipe.read(8), "big")
        words = bytearray()
        while len(words) < size and (part := pipe.read(size - len(words))):
            words += part
    if len(words) < size or not size:
        return  # the supervisor is gone already

    def listen() -> None:
        os.read(0, 1)
        stop.set()

    threading.Thread(target=listen, daemon=True, name="stop").start()
    ended = work(cloudpickle.loads(bytes(words)), stop.is_set)
    ended = replace(ended, bug=ended.bug[-20_000:])  # the pipe holds so much
    os.write(told, json.dumps(asdict(ended)).encode())
    sys.stderr.flush()
    os._exit(0)  # nothing is left to do, and the thread that listens would be in the way
