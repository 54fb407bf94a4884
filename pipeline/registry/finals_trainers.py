"""Who trains the recipes of finals: this process, one after the other, or several worker processes at once."""

import contextlib
import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from pipeline import experiment
from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.experiment import ExperimentRequest, Interrupted, Outcome
from pipeline.processes import this_process
from pipeline.recipe import Recipe
from pipeline.registry.racing import Candidate
from pipeline.sections.data import Data
from pipeline.tracking import recovery
from pipeline.tracking.queries import StudyRuns
from pipeline.tracking.tags import RunTags
from pipeline.tracking.tracker import MlflowTracker
from pipeline.training.loop import EpochReport
from pipeline.training.placement import Placement
from pipeline.training.resume import CHECKPOINTS
from pipeline.worker_process import WorkerBug, WorkerProcess

MODULE = "pipeline.registry.finals_worker"  # whose `main` a worker process runs
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
        self._check_stop()

        def after_epoch(report: EpochReport) -> None:
            on_epoch(report)
            self._check_stop()

        tags = RunTags(
            role="final",
            study=self.study.name,
            trial=candidate.trial,
            trial_run=candidate.trial_run,
            candidate=candidate.digest,
            seed=recipe.training.seed,
            worker=this_process(),
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
            on_epoch=after_epoch,
            on_step=self._check_stop,
        )
        return experiment.run(request, self.tracker)

    def _check_stop(self, *progress: object) -> None:
        if self.stop_requested():
            raise Interrupted(self.stop_reason)


class Trainers(Protocol):
    """Train what they are given, as many at once as they are."""

    def next_ended(self, trainings: Sequence[Training]) -> tuple[Training, Outcome]:
        """The next training that ends. `trainings` are those that are needed, the most urgent first, those begun too.

        Raises Interrupted where the user asked to stop.
        """


@dataclass(frozen=True)
class OwnProcess:
    """One training after the other, here; see Trainers."""

    trainer: Trainer
    observer: FinalsObserver

    def next_ended(self, trainings: Sequence[Training]) -> tuple[Training, Outcome]:
        """See Trainers."""
        first = trainings[0]
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
    data_place: str | None  # where the data set lies
    placement: Placement


@dataclass
class _Slot:
    """Room for a worker, which starts with its first training."""

    setup: WorkerSetup
    process: WorkerProcess | None = None
    training: Training | None = None  # under way


class WorkerProcesses:
    """A process for each setup, each with one training at a time; see Trainers."""

    def __init__(self, setups: Sequence[WorkerSetup], observer: FinalsObserver, stop_requested: Callable[[], bool]):
        self._slots = [_Slot(setup) for setup in setups]
        self._observer, self._stop_requested = observer, stop_requested
        self._begun: set[str] = set()  # run keys
        self._ended: deque[tuple[Training, Outcome]] = deque()

    def next_ended(self, trainings: Sequence[Training]) -> tuple[Training, Outcome]:
        """See Trainers. UserError where a worker's process died; the error, or the bug, that ended a worker."""
        while True:
            if self._stop_requested():
                raise Interrupted
            self._listen()
            self._begin(trainings)
            if self._ended:
                return self._ended.popleft()
            time.sleep(TICK_S)

    def _begin(self, trainings: Sequence[Training]) -> None:
        """Give idle workers the first of those that no worker has."""
        waiting = (training for training in trainings if training.run_key not in self._begun)
        for slot in self._slots:
            if slot.training or not (training := next(waiting, None)):
                continue
            if slot.process is None:
                slot.process = WorkerProcess(MODULE, slot.setup.placement.threads)
                slot.process.send(pickle.dumps(slot.setup))
            self._begun.add(training.run_key)
            slot.training = training
            slot.process.send(pickle.dumps(training))
            self._observer.started(training.name, training.recipe)

    def _listen(self) -> None:
        for number, slot in enumerate(self._slots, 1):
            if slot.process is None:
                continue
            cause = slot.process.ended()
            for answer in slot.process.answers():
                self._take_in(number, slot, pickle.loads(answer))
            if cause:
                raise UserError(
                    f"worker {number}", cause, "the same command resumes; fewer `--workers` need less memory"
                )

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
        self._ended.append((slot.training, answer))
        slot.training = None

    def close(self) -> None:
        """End all workers; what they were training is kept, and resumed by the next finals that need it."""
        processes = [slot.process for slot in self._slots if slot.process]
        deadline = time.monotonic() + END_S
        try:
            for process in processes:
                process.stop()
            while not all(process.ended() for process in processes) and time.monotonic() < deadline:
                time.sleep(TICK_S)
        finally:  # also at a second Ctrl-C
            for process in processes:
                process.kill()


@contextlib.contextmanager
def trainers(
    trainer: Trainer, about: Data, placements: Sequence[Placement], observer: FinalsObserver
) -> Iterator[Trainers]:
    """Worker processes where there is more than one placement, else this process. `about` is the data set, by a recipe."""
    if len(placements) == 1:
        yield OwnProcess(trainer, observer)
        return
    tracker, data = trainer.tracker, trainer.data
    setups = [
        WorkerSetup(tracker.home, tracker.uri, trainer.study, about, data.digest, data.place, placement)
        for placement in placements
    ]
    try:
        with contextlib.closing(WorkerProcesses(setups, observer, trainer.stop_requested)) as workers:
            yield workers
    finally:
        recovery.adopt_journals(tracker)  # of workers that died, or that MLflow did not answer
