"""A study's best trial compared with its control."""

from dataclasses import dataclass

import pandas as pd

from pipeline.report.analysis import Lead, lead
from pipeline.report.stored import Predictions, predictions
from pipeline.report.trials import challenger, control, feasible, ranked
from pipeline.tracking.tracker import MlflowTracker


@dataclass(frozen=True, eq=False)
class Comparison:
    """A study's best trial, or its runner-up, and its control; with the predictions of both, None where they are gone."""

    best: pd.Series
    label: str  # best or runner-up
    control: pd.Series | None
    best_predictions: Predictions | None
    control_predictions: Predictions | None
    lead: Lead | None  # None: they can't be paired

    @property
    def has_control(self) -> bool:
        """Whether there is a control, and another trial than it to compare with it."""
        return self.control is not None and self.control["run_id"] != self.best["run_id"]

    @property
    def run_ids(self) -> list[str]:
        """Of the best and the control."""
        return [str(run["run_id"]) for run in (self.best, self.control) if run is not None]

    @property
    def stored_predictions(self) -> dict[str, Predictions]:
        """Name -> predictions of those that have them, the best first."""
        by_name = {f"the {self.label}": self.best_predictions}
        by_name |= {"the control": self.control_predictions} if self.has_control else {}
        return {name: run for name, run in by_name.items() if run is not None}


def compare_with_control(tracker: MlflowTracker, frame: pd.DataFrame, runner_up: bool = True) -> Comparison | None:
    """A study's best trial and its control; the best is its `runner_up` where the control is it. None: none feasible."""
    challenging, base = challenger(frame), control(frame)
    if challenging is None:
        return None
    best, label = challenging if runner_up else (feasible(frame).iloc[0], "best")
    of_best, of_control, best_lead = predictions(tracker, best["run_id"]), None, None
    if base is not None and base["run_id"] == best["run_id"]:
        of_control = of_best
    elif base is not None:
        of_control = predictions(tracker, base["run_id"])
        num_others = len(ranked(frame)) - 1  # pruned ones were candidates too
        best_lead = lead(of_best, of_control, best["objective"], num_others) if of_best and of_control else None
    return Comparison(best, label, base, of_best, of_control, best_lead)
