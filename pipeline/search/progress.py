"""How far a study is, and what its trials gave, read from Optuna."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from pipeline.evaluation.constraints import nearest, violations
from pipeline.search.search import Search
from pipeline.search.trial_attributes import TrialAttributes, is_feasible


@dataclass(frozen=True)
class StudyProgress:
    """How far a study is, as a person is told."""

    name: str
    finished: int  # trials that count against the budget
    pruned: int
    failed: int  # or interrupted
    trials: int  # that there will be in all, as it looks now
    best: tuple[int, float] | None  # number and score of a feasible one
    infeasible: int = 0  # completed, or pruned before they were trained
    short: int = 0  # of which none is counted as pruned
    in_full: int = 0  # completed, infeasible ones too


def study_progress(study: optuna.Study, finished: int, in_all: int = 0) -> StudyProgress:
    """Of a study of which so many trials have ended, of so many."""
    infeasible = [trial for trial in study.get_trials(deepcopy=False) if not is_feasible(trial)]
    pruned = study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
    completed = _completed(study)
    short = [trial for trial in pruned if TrialAttributes.of(trial).short and is_feasible(trial)]
    feasible = (trial for trial in completed if is_feasible(trial))
    best = min(feasible, key=lambda trial: (-(trial.value or 0.0), trial.number), default=None)
    return StudyProgress(
        name=study.study_name,
        finished=finished,
        pruned=sum(map(is_feasible, pruned)) - len(short),
        failed=finished - len(completed) - len(pruned),
        trials=in_all,
        best=(best.number, best.value or 0.0) if best else None,
        infeasible=len(infeasible),
        short=len(short),
        in_full=len(completed),
    )


def records(study: optuna.Study, search: Search, exclude: Collection[str] = ()) -> list[dict[str, Any]]:
    """The completed trials as rows of `report.trials.table`, of what a table of the best needs; `run_id` is the run's key.

    From Optuna, which has them all when a study ends; MLflow may be unreachable, or get the last of them later. The run
    keys to `exclude` are left out.
    """
    return [
        {
            **{name: _as_text(value) for name, value in search.recipe(trial.params).flat().items()},
            **attributes.metrics,
            "study": study.study_name,
            "trial": trial.number,
            "run_id": attributes.run_key,
            "role": "trial",
            "state": "finished",
            "infeasible": violations(search.study.constraints, attributes.metrics),
            "control": attributes.control,
            "objective": search.study.objective,
            "score": trial.value,
            "seconds": attributes.seconds,
            "epochs": attributes.epochs,
        }
        for trial, attributes in ((trial, TrialAttributes.of(trial)) for trial in _completed(study))
        if attributes.run_key not in exclude
    ]


def _as_text(value: Any) -> Any:
    """A list as MLflow keeps it; what else a recipe holds as it is."""
    return str(list(value)) if isinstance(value, tuple) else value


def _completed(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def nearest_infeasible(study: optuna.Study, search: Search) -> str:
    """Of infeasible trials the nearest to the bounds, as `constraints.nearest` words it; empty where there are none."""
    measured = [
        (f"trial {trial.number}", TrialAttributes.of(trial).metrics)
        for trial in study.get_trials(deepcopy=False)
        if not is_feasible(trial)
    ]
    return nearest(search.study.constraints, measured) if measured else ""
