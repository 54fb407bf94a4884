"""One Optuna trial: from the space to an experiment, and back to a value."""

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import optuna
import torch
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from pipeline import experiment
from pipeline.data.prepare import TrainingData
from pipeline.experiment import Interrupted, Outcome, Prune
from pipeline.recipe import Recipe
from pipeline.search.pruner import MIN_UNPRUNED_TRIALS
from pipeline.search.requeue import requeue, run_name, run_tags
from pipeline.search.storage import RetryingStorage, StorageUnavailable
from pipeline.search.study import Search, StudyProgress
from pipeline.tracking.tags import State
from pipeline.tracking.tracker import MlflowTracker, OwnershipLost
from pipeline.training.loop import EpochReport
from pipeline.training.resume import CHECKPOINTS


@dataclass(frozen=True)
class Progress:
    """Where a trial stands."""

    epoch: int = 1  # under way, from 1
    step: int = 0  # of the epoch, done
    steps: int = 0  # of the epoch, in all
    images_per_s: float = 0.0  # in this epoch so far


class StudyObserver(Protocol):
    """Sees a study happen; for a person at a terminal."""

    def planned(self, forecast: Mapping[str, Any]) -> None:
        """What the study will cost is known: `search.plan.Forecast` as a mapping."""

    def study_progress(self, progress: StudyProgress) -> None:
        """The study opened, or a trial ended."""

    def trial_started(self, number: int, recipe: Recipe, params: Mapping[str, Any]) -> None:
        """A trial's recipe is known."""

    def step(self, number: int, progress: Progress) -> None:
        """A trial's step was done."""

    def epoch(self, number: int, report: EpochReport) -> None:
        """A trial's epoch was measured."""

    def trial_ended(self, number: int, outcome: Outcome) -> None:
        """A trial ended, in whatever state."""


class TrialFailed(Exception):
    """The trial could not be finished; the study goes on."""


class StudyInterrupted(Exception):
    """Somebody asked to stop; the study can be resumed."""


@dataclass(frozen=True)
class Objective:
    """What Optuna calls for each trial."""

    search: Search
    data: TrainingData
    device: torch.device
    tracker: MlflowTracker
    parent: str
    observer: StudyObserver
    stop_requested: Callable[[], bool]
    storage: RetryingStorage
    home: Path

    def __call__(self, trial: optuna.Trial) -> float:
        """Run the trial; its score, or Optuna's or our own exception for how else it ended.

        One that was interrupted, or met a bug, is asked again when the study goes on. Lost, where the trial was declared
        dead, as a process that was paused for too long finds.
        """
        try:
            with _ours():
                return self._run(trial)
        except (optuna.TrialPruned, TrialFailed, OwnershipLost, StorageUnavailable):
            raise
        except BaseException as error:
            with _ours():
                requeue(trial.study, trial)
            if isinstance(error, SystemExit):  # rich ends so where nobody reads any more
                raise StudyInterrupted from error
            raise

    def _run(self, trial: optuna.Trial) -> float:
        with self.storage.batch_writes():
            self.search.ask(trial)
            recipe = self.search.recipe(trial.params)
            trial.set_user_attr("recipe_digest", recipe.digest())
            key = trial.user_attrs.get("run_key")  # a retry has that of the trial whose place it takes
            if key is None:
                key = uuid.uuid4().hex
                trial.set_user_attr("run_key", key)
        self.observer.trial_started(trial.number, recipe, trial.params)

        is_whole = trial.number < MIN_UNPRUNED_TRIALS or trial.user_attrs.get("whole")
        reported = set(
            trial.study._storage.get_trial(trial._trial_id).intermediate_values
        )  # of a retry, before it died
        clock = _Clock(recipe.training.batch_size)

        def on_epoch(report: EpochReport) -> None:
            clock.epoch_ended()
            self.observer.epoch(trial.number, report)
            if (step := self.search.step(report.epoch, recipe)) not in reported:
                with _ours():
                    trial.report(report.metrics[self.search.study.objective], step)
            if not is_whole and report.epoch < recipe.training.epochs and trial.should_prune():
                raise Prune(f"not among the best quarter after epoch {report.epoch}")
            if self.stop_requested():
                raise Interrupted

        def on_step(epoch: int, step: int, steps: int) -> None:
            self.observer.step(trial.number, clock.step(epoch, step, steps))
            if self.stop_requested():
                raise Interrupted

        def fence() -> None:
            if self.storage.state_of(trial._trial_id) is not TrialState.RUNNING:
                raise OwnershipLost

        outcome = experiment.run(
            recipe,
            self.data,
            self.device,
            self.tracker,
            name=run_name(trial),
            parent=self.parent,
            tags=run_tags(trial.study, trial),
            on_epoch=on_epoch,
            on_step=on_step,
            fence=fence,
            resume=self.home / CHECKPOINTS / key,
            key=key,
        )
        with self.storage.batch_writes():
            for name, value in (
                ("state", outcome.state),
                ("reason", outcome.reason),
                ("notes", outcome.notes),
                ("mlflow_run_id", outcome.run_id),
                ("epochs", outcome.epochs),
                ("seconds", round(outcome.seconds, 3)),
                ("metrics", outcome.metrics),
                ("epoch_s", outcome.metrics.get("time/epoch_s")),
            ):
                trial.set_user_attr(name, value)
        self.observer.trial_ended(trial.number, outcome)
        return self._told(trial, outcome)

    def _told(self, trial: optuna.Trial, outcome: Outcome) -> float:
        """The outcome in Optuna's words."""
        if outcome.state is State.PRUNED:
            raise optuna.TrialPruned(outcome.reason)
        if outcome.state is State.FAILED:
            raise TrialFailed(outcome.reason)
        if outcome.state is State.INTERRUPTED:
            raise StudyInterrupted
        return outcome.metrics[self.search.study.objective]


@dataclass
class _Clock:
    """Makes Progress of steps."""

    batch_size: int
    began: float = field(default_factory=time.monotonic)  # s

    def epoch_ended(self) -> None:
        self.began = time.monotonic()

    def step(self, epoch: int, step: int, steps: int) -> Progress:
        seconds = max(time.monotonic() - self.began, 1e-9)
        return Progress(epoch, step, steps, step * self.batch_size / seconds)


@contextlib.contextmanager
def _ours() -> Iterator[None]:
    """What Optuna refuses because the trial has ended: somebody declared it dead."""
    try:
        yield
    except UpdateFinishedTrialError:
        raise OwnershipLost from None
