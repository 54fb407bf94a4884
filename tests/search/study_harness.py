"""What the tests of this folder share: a study in a folder of its own, and observers of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from pipeline.data.prepare import TrainingData
from pipeline.experiment import Outcome
from pipeline.recipe import Recipe
from pipeline.search.progress import StudyProgress
from pipeline.search.run_study import run_study
from pipeline.search.search import Search
from pipeline.search.storage import open_storage
from pipeline.search.study import Study
from pipeline.search.trial import StudyContext
from pipeline.search.trial_attributes import Progress, TrialAttributes
from pipeline.search.worker_pool import WorkerPool
from pipeline.tracking.tracker import MlflowTracker
from pipeline.training.loop import EpochReport

CPU = torch.device("cpu")


def rates(trial: Any) -> None:
    """A space of one parameter."""
    trial.suggest_float("optimizer.lr", 1e-3, 1, log=True)


def search_of(base: Recipe, trials: int, asks_epochs: bool = False) -> Search:
    """Of the learning rate, and of the epochs where it asks for them; nothing is stored of it."""

    def space(trial: Any) -> None:
        trial.suggest_float("optimizer.lr", 1e-3, 1, log=True)
        if asks_epochs:
            trial.suggest_int("training.epochs", 2, 6, step=2)

    study = Study(question="?", base=base, space=space, objective="val/accuracy", trials=trials)
    return Search("lab", study, {}, version=1, trials=trials, timeout_s=None)


def stored(states: list[TrialState]) -> optuna.Study:
    """A study whose trials ended so."""
    study = optuna.create_study()
    for state in states:
        value = 0.5 if state is TrialState.COMPLETE else None
        study.add_trial(optuna.trial.create_trial(state=state, value=value))
    return study


class RecordingObserver:
    """A StudyObserver that records; `at_epoch` and `at_first_step` may act, as a user or a fault would."""

    def __init__(
        self,
        at_epoch: Callable[[int, EpochReport], None] = lambda number, report: None,
        at_first_step: Callable[[int], None] = lambda number: None,
    ):
        self.outcomes: dict[int, Outcome] = {}
        self.finished: list[int] = []
        self.started: list[tuple[int, dict[str, Any]]] = []
        self.steps: list[tuple[int, Progress]] = []
        self.forecast: Any = None
        self._at_epoch, self._at_first_step, self._started = at_epoch, at_first_step, set[int]()

    def planned(self, forecast: Any) -> None:
        self.forecast = forecast

    def study_progress(self, progress: StudyProgress) -> None:
        self.finished.append(progress.finished)

    def trial_started(self, number: int, recipe: Recipe, params: Any, full_of: int | None = None) -> None:
        self.started.append((number, dict(params)))

    def step(self, number: int, progress: Progress) -> None:
        self.steps.append((number, progress))
        if number not in self._started:
            self._started.add(number)
            self._at_first_step(number)

    def epoch(self, number: int, report: EpochReport) -> None:
        self._at_epoch(number, report)

    def trial_ended(self, number: int, outcome: Outcome) -> None:
        self.outcomes[number] = outcome


class StudyHarness:
    """The study `tiny` in a folder of its own, with real stores and real trainings."""

    key = "tiny-v1-digits"

    def __init__(self, home: Path, base: Recipe, data: TrainingData, storage: str | None = None):
        self.home, self.base, self.data = home, base, data
        self.storage, self.tracker = open_storage(home, storage), MlflowTracker(home)

    def search(
        self,
        trials: int,
        space: Any = rates,
        base: Recipe | None = None,
        fields: dict[str, Any] | None = None,
        **limits: Any,
    ) -> Search:
        """`fields` are of the Study."""
        base, fields = base or self.base, {"starts": {}, **(fields or {})}
        study = Study(question="?", base=base, space=space, objective="val/accuracy", trials=trials, **fields)
        return Search("tiny", study, {}, 1, trials, limits.get("timeout_s"), limits.get("patience"))

    def context(self, search: Search, observer: Any = None) -> StudyContext:
        return StudyContext(
            search=search,
            data=self.data,
            device=CPU,
            storage=self.storage,
            tracker=self.tracker,
            observer=observer or RecordingObserver(),
        )

    def run(
        self,
        trials: int,
        space: Any = rates,
        observer: Any = None,
        pool: WorkerPool | None = None,
        changes: dict[str, Any] | None = None,
        **limits: Any,
    ) -> optuna.Study:
        """Run or resume the study; `changes` are of its base recipe."""
        search = self.search(trials, space, self.base.changed(changes or {}), **limits)
        return run_study(self.context(search, observer), pool)

    def empty_study(self) -> optuna.Study:
        """The study without the control."""
        return optuna.create_study(study_name=self.key, storage=self.storage, direction="maximize")

    def study(self) -> optuna.Study:
        return optuna.load_study(study_name=self.key, storage=self.storage)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study().get_trials(states=states or None)

    def runs(self, query: str = "tags.role = 'trial'") -> list[Any]:
        assert self.tracker.flush(60)
        return list(self.tracker.client.search_runs([self.tracker.store.experiment(self.key)], query))

    def runs_by_trial(self) -> dict[int, Any]:
        runs = self.runs()
        numbers = [int(run.data.tags["trial"]) for run in runs]
        assert len(set(numbers)) == len(numbers), "a trial has one run"
        return dict(zip(numbers, runs, strict=True))

    def assert_nothing_runs(self) -> None:
        assert not self.trials(TrialState.RUNNING)
        assert not self.runs("attributes.status = 'RUNNING'")


def attributes_of(trials: list[FrozenTrial]) -> list[TrialAttributes]:
    return [TrialAttributes.of(trial) for trial in trials]
