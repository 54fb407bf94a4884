"""A study whose trials have the scores that a test gives them; its finals are trained, on a real store."""

import itertools
from pathlib import Path
from typing import Any

import torch

from pipeline.data.prepare import TrainingData
from pipeline.experiment import Outcome
from pipeline.recipe import Recipe
from pipeline.registry.decision import FinalsDecision
from pipeline.registry.finals import FinalsPlan, plan_finals
from pipeline.registry.finals_run import run_finals
from pipeline.tracking import queries
from pipeline.tracking.queries import StudyRuns, find_studies
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker, RunRequest
from pipeline.training.loop import EpochReport

CPU = torch.device("cpu")
NUMBERS = itertools.count(1)


class RecordingObserver:
    """Keeps the lines and the outcomes of trainings; calls `at_epoch` after each epoch."""

    def __init__(self, at_epoch: Any = None):
        self.lines: list[str] = []
        self.outcomes: dict[str, Outcome] = {}
        self._at_epoch = at_epoch

    def started(self, name: str, recipe: Recipe) -> None: ...

    def epoch(self, name: str, report: EpochReport) -> None:
        if self._at_epoch:
            self._at_epoch()

    def ended(self, name: str, outcome: Outcome) -> None:
        self.outcomes[name] = outcome

    def note(self, line: str) -> None:
        self.lines.append(line)


class StudyHarness:
    """A study whose trials have the scores that a test gives them; its finals are trained."""

    def __init__(self, tracker: MlflowTracker, home: Path, base: Recipe, data: TrainingData):
        self.tracker, self.home, self.base, self.data = tracker, home, base.changed({"training.epochs": 1}), data
        self.name = f"study{next(NUMBERS)}-v1-digits"
        self.tracker.open_study(self.name, "?", "val/accuracy", []).end(State.FINISHED)
        assert self.tracker.flush(30)

    @property
    def study(self) -> StudyRuns:
        return find_studies(self.tracker, self.name)[0]

    def trial(
        self,
        number: int,
        score: float,
        state: State = State.FINISHED,
        control: bool = False,
        seconds: float = 0.5,
        **changes: Any,
    ) -> str:
        recipe = self.base.changed({name.replace("__", "."): value for name, value in changes.items()})
        tags = {"role": "trial", "study": self.name, "trial": str(number)}
        name = f"trial {number}" + (" (control)" if control else "")
        with self.tracker.run(
            RunRequest(name=name, recipe=recipe, data=self.data, parent_run=self.study.parent, tags=RunTags.parse(tags))
        ) as run:
            run.log_metrics({"val/accuracy": score, "time/training_s": seconds}, 1)
            run.end(state)
        return self.tracker.id_of(run.key)

    def plan(self, top: int, seeds: int, epochs: int | None = None, device: torch.device = CPU) -> FinalsPlan:
        return plan_finals(self.tracker, self.study, device, top, seeds, epochs)

    def finals(
        self,
        top: int = 1,
        seeds: int = 2,
        observer: RecordingObserver | None = None,
        workers: int = 1,
        epochs: int | None = None,
    ) -> FinalsDecision:
        planned, observer = self.plan(top, seeds, epochs), observer or RecordingObserver()
        decision = run_finals(self.tracker, planned, self.data, CPU, observer, workers=workers)
        assert decision, "there is no time limit"
        return decision

    def runs(self, role: str = "final") -> list[Any]:
        return queries.children(self.tracker, self.study, role)


def with_two_trials(harness: StudyHarness) -> StudyHarness:
    harness.trial(0, 0.5, control=True)
    harness.trial(1, 0.7, optimizer__lr=0.05)
    return harness
