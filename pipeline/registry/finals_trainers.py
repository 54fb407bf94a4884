"""Who trains the recipes of finals: this process, one after the other, or several worker processes at once."""

import contextlib
import math
import pickle
import signal
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from pipeline import experiment
from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.experiment import ExperimentRequest, Interrupted, Outcome
from pipeline.processes import StopOnSignal
from pipeline.recipe import Recipe
from pipeline.registry.racing import Candidate
from pipeline.sections.data import Data
from pipeline.tracking import recovery
from pipeline.tracking.queries import StudyRuns
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker
from pipeline.training.loop import EpochReport
from pipeline.training.placement import Placement, placements
from pipeline.training.resume import CHECKPOINTS
from pipeline.worker_process import WorkerBug, WorkerProcess

MODULE = "pipeline.registry.finals_worker"  # whose `main` a worker process runs
CANCEL = b""  # a message that only stops what a worker is training
MAX_DEATHS = 3  # of workers in a row, while no training ended: another start would not help
TICK_S = 0.1  # between two looks at the workers
END_S = 7.0  # for workers to end when they are asked to; systems kill after 10


@dataclass(frozen=True)
class Training:
    """One of a candidate: with a seed, and on a fold where there are any."""

    candidate: Candidate
    recipe: Recipe
    run_key: str

    @property
    def name(self) -> str:
        """`trial 3, seed 2`."""
        about = self.recipe.data
        fold = f", fold {about.fold + 1} of {about.folds}" if about.folds else ""
        return f"{self.candidate.name}, seed {self.recipe.training.seed}{fold}"


class FinalsObserver(Protocol):
    """Sees finals happen; for a person at a terminal. A training is known by its name."""

    def started(self, name: str, recipe: Recipe) -> None:
        """A training begins."""

    def epoch(self, name: str, report: EpochReport) -> None:
        """Its epoch was measured."""

    def ended(self, name: str, outcome: Outcome) -> None:
        """It ended, in whatever state."""

    def note(self, line: str) -> None:
        """Anything else, as a line."""


@dataclass(frozen=True)
class Trainer:
    """Trains on the data and the device of its process, each training under a run of its own."""

    tracker: MlflowTracker
    study: StudyRuns
    data: TrainingData
    device: torch.device
    stop_requested: Callable[[], bool]
    stop_reason: str = ""  # where it is not the user

    def train(self, training: Training, on_epoch: Callable[[EpochReport], None]) -> Outcome:
        """How it ended: INTERRUPTED where it was stopped midway. Interrupted where it was to stop before it began."""
        candidate, recipe = training.candidate, training.recipe
        if self.stop_requested():
            raise Interrupted(self.stop_reason)
        tags = RunTags(
            role="final",
            study=self.study.name,
            trial=candidate.trial,
            trial_run=candidate.trial_run,
            candidate=candidate.digest,
            seed=recipe.training.seed,
        )
        request = ExperimentRequest(
            recipe=recipe,
            data=self.data,
            device=self.device,
            name=f"final of {training.name}",
            parent_run=self.study.parent,
            tags=tags,
            run_key=training.run_key,
            resume_dir=self.tracker.home / CHECKPOINTS / training.run_key,
            on_epoch=on_epoch,
            stop_requested=self.stop_requested,
            stop_reason=self.stop_reason,
        )
        return experiment.run(request, self.tracker)


class Trainers(Protocol):
    """Train what they are given: one training at a time in this process, or one in each worker."""

    def next_ended(self, needed: Sequence[Training]) -> tuple[Training, Outcome]:
        """The next training that ends. `needed` are those that are, the most urgent first; those under way too.

        Raises Interrupted where the user asked to stop.
        """


@dataclass(frozen=True)
class OwnProcess:
    """One training after the other, here; see Trainers."""

    trainer: Trainer
    observer: FinalsObserver

    def next_ended(self, needed: Sequence[Training]) -> tuple[Training, Outcome]:
        """See Trainers."""
        first = needed[0]
        self.observer.started(first.name, first.recipe)
        return first, self.trainer.train(first, partial(self.observer.epoch, first.name))


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker process needs to know before its first training; it reads the data itself."""

    home: Path
    tracking_uri: str = field(repr=False)  # it may hold a password
    study: StudyRuns
    about: Data  # the data set, by the recipe of any candidate
    data_digest: str
    data_source: str  # where it was found
    in_files: bool  # a folder or a manifest
    placement: Placement


@dataclass
class _Slot:
    """Room for a worker, which starts with its first training, and for another after it if it dies."""

    setup: WorkerSetup
    process: WorkerProcess | None = None
    training: Training | None = None  # under way
    is_cancelled: bool = False  # the training: it is to stop


class WorkerProcesses:
    """A process for each setup, each with one training at a time; see Trainers."""

    def __init__(self, setups: Sequence[WorkerSetup], observer: FinalsObserver, stop: StopOnSignal):
        self._slots = [_Slot(setup) for setup in setups]
        self._observer, self._stop = observer, stop
        self._begun: set[str] = set()  # run keys
        self._ended: deque[tuple[Training, Outcome]] = deque()
        self._deaths = 0  # in a row

    def next_ended(self, needed: Sequence[Training]) -> tuple[Training, Outcome]:
        """See Trainers. What is no longer needed is stopped; it can be resumed.

        Raises the error or the bug that ended a worker. Where a process dies, another goes on with its training; UserError
        after MAX_DEATHS in a row.
        """
        while not self._ended:
            if self._stop.requested:
                raise Interrupted
            for number, slot in enumerate(self._slots, 1):
                if slot.process:
                    self._listen(number, slot, slot.process)
            self._cancel({training.run_key for training in needed})
            self._begin(needed)
            time.sleep(TICK_S)
        return self._ended.popleft()

    def _begin(self, needed: Sequence[Training]) -> None:
        """Give idle workers the first of those that no worker has."""
        waiting = (training for training in needed if training.run_key not in self._begun)
        for slot in self._slots:
            if slot.training or not (training := next(waiting, None)):
                continue
            if slot.process:
                slot.process.send(pickle.dumps(training))
            else:
                slot.process = WorkerProcess(MODULE, slot.setup.placement.threads)
                slot.process.send(pickle.dumps((slot.setup, training)))
            self._begun.add(training.run_key)
            slot.training, slot.is_cancelled = training, False
            self._observer.started(training.name, training.recipe)

    def _cancel(self, needed: Collection[str]) -> None:
        for slot in self._slots:
            if slot.process and slot.training and slot.training.run_key not in needed and not slot.is_cancelled:
                slot.process.send(CANCEL)
                slot.is_cancelled = True

    def _listen(self, number: int, slot: _Slot, process: WorkerProcess) -> None:
        cause = process.ended()
        for answer in process.answers():
            self._take_in(number, slot, pickle.loads(answer))
        if not cause:
            return
        slot.process = None
        if not slot.training:
            return  # it was idle
        name = slot.training.name
        self._begun.remove(slot.training.run_key)
        slot.training = None
        if slot.is_cancelled:
            return
        self._deaths += 1
        if self._deaths >= MAX_DEATHS:
            remedy = "the same command resumes; fewer `--workers` need less memory"
            raise UserError(f"worker {number}", f"{cause}, after {MAX_DEATHS - 1} others in a row", remedy)
        self._observer.note(f"worker {number}: {cause}; another one goes on with {name}")

    def _take_in(self, number: int, slot: _Slot, answer: EpochReport | Outcome | UserError | str) -> None:
        """What a worker says of its training; a string is the traceback of a bug."""
        if isinstance(answer, UserError):
            raise answer
        if isinstance(answer, str):
            raise WorkerBug(f"in worker {number}:\n{answer}")
        assert slot.training, "it answers for a training only"
        if isinstance(answer, EpochReport):
            self._observer.epoch(slot.training.name, answer)
            return
        if answer.state is State.INTERRUPTED and not slot.is_cancelled:
            return  # by a signal of its own: it ends
        training, slot.training = slot.training, None
        if slot.is_cancelled and not answer.is_conclusive:
            self._begun.remove(training.run_key)  # it may be needed again
            self._observer.ended(training.name, answer)
            return
        self._deaths = 0
        self._ended.append((training, answer))

    def close(self) -> None:
        """End all workers; what they were training is kept, and resumed by the next finals that need it.

        After Ctrl-C they end at their next step however long that takes, or at the second one. Systems that send SIGTERM
        kill after ten seconds.
        """
        processes = [slot.process for slot in self._slots if slot.process]
        deadline = math.inf if self._stop.number == signal.SIGINT else time.monotonic() + END_S
        try:
            for process in processes:
                process.stop()
            while not all(process.ended() for process in processes) and time.monotonic() < deadline:
                time.sleep(TICK_S)
        finally:
            for process in processes:
                process.kill()


@contextlib.contextmanager
def trainers(
    tracker: MlflowTracker,
    study: StudyRuns,
    data: TrainingData,
    about: Data,
    device: torch.device,
    workers: int,
    observer: FinalsObserver,
    stop: StopOnSignal,
) -> Iterator[Trainers]:
    """So many worker processes, or this process for one. `about` is the data set, by the recipe of any candidate."""
    if workers == 1:
        yield OwnProcess(Trainer(tracker, study, data, device, lambda: stop.requested), observer)
        return
    setups = [
        WorkerSetup(
            home=tracker.home,
            tracking_uri=tracker.uri,
            study=study,
            about=about,
            data_digest=data.digest,
            data_source=data.source,
            in_files=data.listed is not None,
            placement=placement,
        )
        for placement in placements(device, workers)
    ]
    try:
        with contextlib.closing(WorkerProcesses(setups, observer, stop)) as pool:
            yield pool
    finally:
        recovery.adopt_journals(tracker)  # of workers that died, or that MLflow did not answer
