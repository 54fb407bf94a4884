"""One trial: claimed, made a recipe by the space, run as an experiment, and its result told to Optuna."""

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from pipeline import experiment
from pipeline.data.prepare import TrainingData
from pipeline.evaluation.constraints import excess
from pipeline.experiment import ExperimentRequest, Interrupted, Outcome, Prune
from pipeline.recipe import Recipe
from pipeline.search.local_search import SpaceExhausted
from pipeline.search.optuna_internals import claimed_trial, stored_trial, study_id, trial_id, was_stopped
from pipeline.search.progress import StudyProgress
from pipeline.search.requeue import requeue, run_name, run_tags
from pipeline.search.search import Search
from pipeline.search.storage import RetryingStorage, StorageUnavailable
from pipeline.search.study_attributes import StudyAttributes
from pipeline.search.trial_attributes import Progress, TrialAttributes, update_attributes
from pipeline.tracking.tracker import MlflowTracker, OwnershipLost, State
from pipeline.training.loop import EpochReport
from pipeline.training.resume import CHECKPOINTS

TIME_IS_UP = "the time of the search was up"  # how the reason of a trial that it interrupted begins
SHORT = "a short trial"  # why it ends as one that was pruned


class StudyObserver:
    """Sees a study happen; for a person at a terminal. What a class of it doesn't say does nothing."""

    def planned(self, forecast: Mapping[str, Any]) -> None:
        """The study's cost is known: `search.forecast.Forecast` as a mapping."""

    def study_progress(self, progress: StudyProgress) -> None:
        """The study opened, or a trial ended."""

    def trial_started(self, number: int, recipe: Recipe, params: Mapping[str, Any], full_of: int | None = None) -> None:
        """A trial's recipe is known; it may be that of a short trial, in full."""

    def step(self, number: int, progress: Progress) -> None:
        """A trial's step was done."""

    def epoch(self, number: int, report: EpochReport) -> None:
        """A trial's epoch was measured."""

    def trial_ended(self, number: int, outcome: Outcome) -> None:
        """A trial ended, in whatever state."""


class TrialFailed(Exception):
    """The trial could not be finished; the study continues."""


class StudyInterrupted(Exception):
    """The user asked to stop; the study can be resumed."""


class _TimeIsUp(Exception):
    """The search's time was up in the middle of a trial: it is requeued, and goes on where the study is resumed."""


@dataclass(frozen=True, kw_only=True)
class StudyContext:
    """What all who work on a study share: its command, its supervisor and each worker have one of their own."""

    search: Search
    data: TrainingData
    device: torch.device
    storage: RetryingStorage
    tracker: MlflowTracker
    observer: StudyObserver
    parent_run: str = ""  # the study's run in MLflow; known once the study is open
    stop_requested: Callable[[], bool] = lambda: False

    @property
    def home(self) -> Path:
        """The folder `mlruns`, where locks, journals and checkpoints lie."""
        return self.tracker.home

    def check_stop(self, *progress: object) -> None:
        """Raise StudyInterrupted where the user asked to stop."""
        if self.stop_requested():
            raise StudyInterrupted


def claim_trial(study: optuna.Study, storage: RetryingStorage, worker: Mapping[str, Any]) -> optuna.Trial | None:
    """A released trial that is this worker's from now on; None where there is none. (`study.ask` would make one.)"""
    for candidate in storage.released(study_id(study)):
        if storage.claim(candidate, worker):
            return claimed_trial(study, candidate)
    return None


def run_trial(trial: optuna.Trial, context: StudyContext) -> None:
    """Run a claimed trial and tell Optuna how it ended, as `study.optimize` does; raises what stops a study."""
    state: TrialState | None = None
    value: float | None = None
    failure: BaseException | None = None
    try:
        value = _score(trial, context)
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except (TrialFailed, _TimeIsUp):
        state = TrialState.FAIL
    except SpaceExhausted:
        state = TrialState.FAIL
        update_attributes(trial.study, trial, unused=True)
    except OwnershipLost:
        return
    except BaseException as error:
        state, failure = TrialState.FAIL, error
    try:
        trial.study.tell(trial, value, state)
    except (ValueError, UpdateFinishedTrialError):
        # A trial that was declared dead meanwhile has a successor, and its result is not wanted.
        if context.storage.state_of(trial_id(trial)) is TrialState.RUNNING:
            raise
    if was_stopped(trial.study):
        StudyAttributes.update(trial.study, stopped_by=type(trial.study.sampler).__name__)
    if failure:
        raise failure


def _score(trial: optuna.Trial, context: StudyContext) -> float:
    """The trial's score, or an exception of Optuna's or ours for any other end.

    A trial that was interrupted, by the user or because the time was up, or met a bug, is requeued. OwnershipLost where the
    trial was declared dead, as a process that was paused for too long finds.
    """
    try:
        with _ownership_required():
            return _value_of(_run(trial, context), context.search.study.objective)
    except (optuna.TrialPruned, TrialFailed, SpaceExhausted, OwnershipLost, StorageUnavailable):
        raise
    except BaseException as error:
        with _ownership_required():
            requeue(trial.study, trial)
        if isinstance(error, SystemExit):  # as rich does where the output was closed
            raise StudyInterrupted from error
        raise


def _run(trial: optuna.Trial, context: StudyContext) -> Outcome:
    storage, observer, attributes = context.storage, context.observer, TrialAttributes.of(trial)
    key = attributes.run_key or uuid.uuid4().hex  # a retry has the key of the trial whose place it takes
    with storage.batch_writes():
        context.search.ask(trial)
        full = context.search.recipe(trial.params)
        recipe = context.search.short(full) if attributes.short else full
        update_attributes(trial.study, trial, recipe_digest=recipe.digest(), run_key=key)
    observer.trial_started(trial.number, recipe, trial.params, attributes.full_of)

    def check_ownership() -> None:
        if storage.state_of(trial_id(trial)) is not TrialState.RUNNING:
            raise OwnershipLost

    reporter = _Reporter(trial, context, recipe, attributes.short)
    request = ExperimentRequest(
        recipe=recipe,
        data=context.data,
        device=context.device,
        name=run_name(trial.number, attributes),
        parent_run=context.parent_run,
        tags=replace(
            run_tags(trial.study, trial.number, attributes),
            short_of=full.training.epochs if attributes.short else None,
        ),
        run_key=key,
        # The control is trained all the same: every other trial is compared with it.
        constraints={} if attributes.control else context.search.study.constraints,
        resume_dir=context.home / CHECKPOINTS / key,
        pruned_at_end=SHORT if attributes.short else "",
        on_epoch=reporter.on_epoch,
        on_step=reporter.on_step,
        stop_requested=context.stop_requested,
        check_ownership=check_ownership,
    )
    outcome = experiment.run(request, context.tracker)
    if outcome.state is not State.INTERRUPTED:
        for name, above in excess(context.search.study.constraints, outcome.metrics).items():
            trial.set_constraint(name, above)
    with storage.batch_writes():
        update_attributes(
            trial.study,
            trial,
            state=outcome.state,
            reason=outcome.reason,
            notes=outcome.notes,
            mlflow_run_id=outcome.run_id,
            epochs=outcome.epochs,
            seconds=round(outcome.seconds, 3),
            metrics=outcome.metrics,
            epoch_s=outcome.metrics.get("time/epoch_s"),
        )
    observer.trial_ended(trial.number, outcome)
    return outcome


def _value_of(outcome: Outcome, objective: str) -> float:
    """The score of a finished trial; every other outcome as the exception that stands for it."""
    if outcome.state is State.PRUNED:
        raise optuna.TrialPruned(outcome.reason)
    if outcome.state is State.FAILED:
        raise TrialFailed(outcome.reason)
    if outcome.state is State.INTERRUPTED:
        raise _TimeIsUp if outcome.reason.startswith(TIME_IS_UP) else StudyInterrupted
    return outcome.metrics[objective]


class _Reporter:
    """The hooks of a trial's training: they report to Optuna and the observer, and prune."""

    def __init__(self, trial: optuna.Trial, context: StudyContext, recipe: Recipe, short: bool):
        self._trial, self._context, self._recipe, self._short = trial, context, recipe, short
        # Of a retry: what was reported before its predecessor died.
        self._reported_steps = set(stored_trial(trial.study, trial).intermediate_values)
        self._clock = _Clock(recipe.training.batch_size)

    def on_epoch(self, report: EpochReport) -> None:
        self._clock.epoch_ended()
        self._context.observer.epoch(self._trial.number, report)
        search = self._context.search
        if (step := search.step(report.epoch, self._recipe, self._short)) not in self._reported_steps:
            with _ownership_required():
                self._trial.report(report.metrics[search.study.objective], step)
        is_last = report.epoch == self._recipe.training.epochs
        if not is_last and self._trial.should_prune():
            raise Prune(f"by {type(self._trial.study.pruner).__name__} after epoch {report.epoch}")
        if not is_last and self._is_late():
            raise Interrupted(f"{TIME_IS_UP} after epoch {report.epoch}")

    def on_step(self, epoch: int, step: int, steps: int) -> None:
        self._context.observer.step(self._trial.number, self._clock.step(epoch, step, steps))

    def _is_late(self) -> bool:
        deadline, study = self._context.search.deadline, self._trial.study
        if deadline is None or time.monotonic() <= deadline or TrialAttributes.of(self._trial).control:
            return False
        return bool(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


@dataclass
class _Clock:
    """Makes Progress of steps."""

    batch_size: int
    epoch_start: float = field(default_factory=time.monotonic)  # s

    def epoch_ended(self) -> None:
        self.epoch_start = time.monotonic()

    def step(self, epoch: int, step: int, steps: int) -> Progress:
        seconds = max(time.monotonic() - self.epoch_start, 1e-9)
        return Progress(epoch, step, steps, step * self.batch_size / seconds)


@contextlib.contextmanager
def _ownership_required() -> Iterator[None]:
    """OwnershipLost instead of Optuna's refusal to change a trial that has ended: the supervisor declared it dead."""
    try:
        yield
    except UpdateFinishedTrialError:
        raise OwnershipLost from None
