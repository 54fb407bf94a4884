"""Which parameters of a study matter, from its finished trials."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState, create_trial

optuna.logging.set_verbosity(optuna.logging.ERROR)

MIN_TRIALS = 4
MAX_CATEGORIES = 6  # numbers with so few distinct values are choices
LOG_RATIO = 30  # a range whose ends differ by more was searched on a log scale


def importance_function(params: Sequence[Mapping[str, Any]]) -> Callable[[Sequence[float]], dict[str, float]]:
    """The function from these trials' scores to importances: parameter -> share, the highest first; they sum to 1.

    A trial may lack some parameters. One study is asked by several scores: to rebuild it takes longer than to ask it.
    Optuna's default, PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255): which parameters tell the best `num_top`
    trials from the others. The study is rebuilt in memory from what was seen, so it needs no Optuna database: a range
    is that of the values tried. Empty where there is nothing to tell: too few trials, or equal scores.
    """
    names = list(dict.fromkeys(name for trial in params for name in trial))
    if len(params) < MIN_TRIALS or not names:
        return lambda scores: {}
    ranges = {name: _range([trial[name] for trial in params if name in trial]) for name in names}
    study = optuna.create_study(direction="maximize")
    study.add_trials(
        create_trial(
            state=TrialState.COMPLETE,
            value=0.0,
            params=dict(trial),
            distributions={name: ranges[name] for name in trial},
        )
        for trial in params
    )

    def compute(scores: Sequence[float]) -> dict[str, float]:
        if len(set(scores)) < 2:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluator = PedAnovaImportanceEvaluator(target_quantile=num_top(len(params)) / len(params))
            shares = get_param_importances(study, evaluator=evaluator, target=lambda trial: -scores[trial.number])
        return dict(sorted(shares.items(), key=lambda item: (-item[1], item[0])))  # Optuna leaves equal ones unordered

    return compute


def num_top(trials: int) -> int:
    """How many of the trials count as the best: a tenth, but five where there are so many (as Optuna advises)."""
    return max(round(0.1 * trials), min(5, trials // 2))


def _range(values: Sequence[Any]) -> BaseDistribution:
    distinct = list(dict.fromkeys(values))
    if len(distinct) <= MAX_CATEGORIES or not all(type(value) in (int, float) for value in distinct):
        return CategoricalDistribution(distinct)
    low, high = min(distinct), max(distinct)
    return FloatDistribution(low, high, log=low > 0 and high / low > LOG_RATIO)
