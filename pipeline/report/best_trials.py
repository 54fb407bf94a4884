"""The rows of the tables of best trials, and what a run changes, in words."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pipeline.recipe import field_label, value_label
from pipeline.report.trials import LATENCY, control, finished, latency, searched, weakest_class, with_control


@dataclass(frozen=True)
class BestTrial:
    """A finished trial as the tables of the best show it; NaN where something was not measured."""

    number: int
    is_control: bool
    infeasible: str  # the constraints that it breaks
    score: float
    lead: float  # over the control's score, in points; NaN where no control finished
    f1_macro: float
    weakest_class: str
    weakest_f1: float
    epochs: int
    seconds: float  # as the table has it: that its epochs took, or of the whole trial
    training_s: float
    parameters: float
    latency_ms: float  # NaN, too, where all have the same network
    changes: str  # against the control

    @property
    def name(self) -> str:
        """`3`, `0 (control, infeasible)`."""
        marks = ["control"] * self.is_control + ["infeasible"] * bool(self.infeasible)
        return f"{self.number}" + (f" ({', '.join(marks)})" if marks else "")


def best_trials(frame: pd.DataFrame, max_trials: int) -> list[BestTrial]:
    """The best finished trials of one study, feasible ones first; below them the control, if it isn't among them."""
    frame = frame.assign(**{LATENCY: latency(frame)})
    base, names = control(frame), searched(frame)
    rows = with_control(finished(frame).head(max_trials), base)
    return [_best_trial(row, base, names) for _, row in rows.iterrows()]


def _best_trial(row: pd.Series, base: pd.Series | None, names: Sequence[str]) -> BestTrial:
    weakest, f1 = weakest_class(row)
    return BestTrial(
        number=row["trial"],
        is_control=row["control"],
        infeasible=row["infeasible"],
        score=row["score"],
        lead=np.nan if base is None else 100 * (row["score"] - base["score"]),
        f1_macro=row.get("val/f1_macro", np.nan),
        weakest_class=weakest,
        weakest_f1=f1,
        epochs=row["epochs"],
        seconds=row["seconds"],
        training_s=row.get("time/training_s", np.nan),
        parameters=row.get("model/parameters", np.nan),
        latency_ms=row[LATENCY],
        changes=changes(row, base, names),
    )


def changes(row: pd.Series, base: pd.Series | None, names: Sequence[str]) -> str:
    """What a run has of these fields and the control has not: `rotation 10, optimizer adam, lr 0.003`."""
    if base is not None and row["run_id"] == base["run_id"]:
        return "the control, the base recipe"
    changed = [name for name in names if pd.notna(row[name]) and (base is None or row[name] != base[name])]
    none = "no field differs between the trials" if base is None else "as the control"
    return ", ".join(f"{field_label(name)} {value_label(row[name])}" for name in changed) or none
