"""One Optuna trial: from the space to an experiment, and back to a value."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import optuna
import torch

from pipeline import experiment
from pipeline.data.prepare import TrainingData
from pipeline.experiment import Interrupted, Outcome, Prune
from pipeline.guard import this_worker
from pipeline.recipe import Recipe
from pipeline.search.replay import WHOLE
from pipeline.search.storage import ask_again
from pipeline.search.study import Search
from pipeline.tracking.runs import MlflowTracker, State
from pipeline.training.loop import EpochReport


class Observer(Protocol):
    """Sees a study happen; for a person at a terminal."""

    def planned(self, forecast: Mapping[str, Any]) -> None:
        """What the study will cost is known: `search.plan.Forecast` as a mapping."""

    def study_progress(self, study: optuna.Study, finished: int) -> None:
        """The study opened, or a trial ended."""

    def trial_started(self, number: int, recipe: Recipe, params: Mapping[str, Any]) -> None:
        """A trial's recipe is known."""

    def step(self, step: int, steps: int) -> None:
        """So many of an epoch's steps are under way."""

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
    observer: Observer
    stop_requested: Callable[[], bool]

    def __call__(self, trial: optuna.Trial) -> float:
        """Run the trial; its score, or Optuna's or our own exception for how else it ended.

        One that was interrupted, or met a bug, is asked again when the study goes on.
        """
        trial.set_user_attr("worker", this_worker())
        try:
            return self._run(trial)
        except (optuna.TrialPruned, TrialFailed):
            raise
        except SystemExit as error:  # rich ends so where nobody reads any more; Optuna would leave the trial RUNNING
            ask_again(trial.study, trial)
            raise StudyInterrupted from error
        except BaseException:
            ask_again(trial.study, trial)
            raise

    def _run(self, trial: optuna.Trial) -> float:
        self.search.ask(trial)
        recipe = self.search.recipe(trial.params)
        trial.set_user_attr("recipe_digest", recipe.digest())
        self.observer.trial_started(trial.number, recipe, trial.params)

        is_judged = True

        def on_epoch(report: EpochReport) -> None:
            nonlocal is_judged
            self.observer.epoch(trial.number, report)
            trial.report(report.metrics[self.search.study.objective], self.search.step(report.epoch, recipe))
            if is_judged and report.epoch < recipe.training.epochs and trial.should_prune():
                if trial.number >= WHOLE:
                    raise Prune(f"not among the best third after epoch {report.epoch}")
                is_judged = False  # to the pruner it ended here, which is what others are compared with
            if self.stop_requested():
                raise Interrupted

        def on_step(step: int, steps: int) -> None:
            self.observer.step(step, steps)
            if self.stop_requested():
                raise Interrupted

        outcome = experiment.run(
            recipe,
            self.data,
            self.device,
            self.tracker,
            name=f"trial {trial.number}" + (" (control)" if trial.user_attrs.get("control") else ""),
            parent=self.parent,
            tags={"role": "trial", "study": trial.study.study_name, "trial": str(trial.number)},
            on_start=lambda run_id: trial.set_user_attr("mlflow_run_id", run_id),
            on_epoch=on_epoch,
            on_step=on_step,
        )
        for name, value in (
            ("state", outcome.state),
            ("reason", outcome.reason),
            ("notes", outcome.notes),
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
