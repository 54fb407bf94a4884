"""The default sampler: each new recipe is one of the best so far, with a few of its parameters changed.

A study is given strong recipes to start from, and has about twenty trials for fifteen parameters. That is too few to learn
where in the whole space to draw: of 22 recipes that TPE drew for one network none was better than the best start, and half
were worse than the worst (studies/search/README.md). Beside a good recipe there are better ones. An evolution strategy by
mutation alone, as in Real et al. 2019 (arXiv 1802.01548).
"""

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import optuna
from numpy.random import RandomState
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState

from pipeline.search.short_trials import score_of
from pipeline.search.space_check import nearest_value
from pipeline.search.trial_attributes import TrialAttributes, is_feasible

MUTATIONS = 2.0  # parameters that change in a trial, on average; at least one does
STEP = 0.2  # standard deviation of a change, as a share of the range, or of the range of the logarithm
NEXT = 0.5  # probability of the parent's being not the best recipe but one below; again for each next
MAX_DRAWS = 100  # before a trial is drawn at random, as all that is near was tried


# A recipe that values are taken from: its parameters' distributions and values.
_Source = tuple[Mapping[str, BaseDistribution], Mapping[str, Any]]


class LocalSearchSampler(RandomSampler):
    """Changes the best recipes; draws at random while no trial has ended, and the first `n_startup_trials` in any case.

    What the parent lacks, as it has another kind of optimizer, comes from the best recipe that has it.
    """

    def __init__(self, n_startup_trials: int = 0, seed: int | None = None):
        super().__init__(seed)
        self._n_startup_trials = n_startup_trials
        # Number of the trial that is being drawn -> its parent, a few values changed, then the other recipes, best first.
        self._sources: dict[int, Sequence[_Source]] = {}

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Choose the parent, and what changes; a recipe that there is already is chosen again."""
        trials = study.get_trials(deepcopy=False)
        recipes = ranked(trials) if trial.number >= self._n_startup_trials else []
        sources: Sequence[_Source] = []
        if recipes:
            tried = [other.params for other in trials]
            drawn = (self._draw(recipes) for _ in range(MAX_DRAWS))
            sources = next((drawn for drawn in drawn if drawn[0][1] not in tried), sources)
        self._sources = {trial.number: sources}

    def _draw(self, recipes: Sequence[FrozenTrial]) -> list[_Source]:
        rng = self._rng.rng
        index = min(rng.geometric(1 - NEXT), len(recipes)) - 1
        parent = recipes[index]
        names = sorted(name for name, asked in parent.distributions.items() if not asked.single())
        chosen = rng.choice(names, min(1 + rng.poisson(MUTATIONS - 1), len(names)), replace=False)
        changes = {name: changed_value(parent.distributions[name], parent.params[name], rng) for name in chosen}
        others = [(other.distributions, other.params) for other in recipes if other is not parent]
        return [(parent.distributions, parent.params | changes), *others]

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The value of the first recipe that has the parameter, with this range."""
        for distributions, params in self._sources[trial.number]:
            if distributions.get(param_name) == param_distribution:
                return params[param_name]
        return super().sample_independent(study, trial, param_name, param_distribution)


def ranked(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials whose recipes can be parents, best first, by the score that they have in full.

    A recipe that was only trained short is credited with what those trained both ways gained on average. Before there is
    one of these, short trials are compared with each other alone; but where a study began with trials in full, as without
    pruning, with what the mean of these is above their own.
    """
    attributes = {trial.number: TrialAttributes.of(trial) for trial in trials}
    feasible = [trial for trial in trials if is_feasible(trial)]
    short = {
        trial.number: score_of(trial)
        for trial in feasible
        if trial.state is TrialState.PRUNED and attributes[trial.number].short and trial.intermediate_values
    }
    full, gains, begun = dict[int, float](), list[float](), list[float]()
    for trial in feasible:
        if trial.state is TrialState.COMPLETE and trial.value is not None:
            source = attributes[trial.number].full_of
            full[trial.number if source is None else source] = trial.value
            if source in short:
                gains.append(trial.value - short[source])
            elif not attributes[trial.number].control:
                begun.append(trial.value)
    if short and begun and not gains:
        gains = [mean(begun) - mean(short.values())]
    scores = short
    if gains or not short:
        scores = {number: score + mean(gains) for number, score in short.items()} | full
    by_number = {trial.number: trial for trial in trials}
    return [by_number[number] for number in sorted(scores, key=lambda number: (-scores[number], number))]


def changed_value(distribution: BaseDistribution, value: Any, rng: RandomState) -> Any:
    """Another choice, or another number near this one."""
    if isinstance(distribution, CategoricalDistribution):
        others = [choice for choice in distribution.choices if choice != value]
        return others[rng.randint(len(others))]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    new = value
    while math.isclose(new, value):
        new = _at(distribution, _position(distribution, value) + STEP * rng.normal())
    return new


def _position(distribution: FloatDistribution | IntDistribution, value: float) -> float:
    """Where a value stands in its range: 0 is the low end, 1 the high one."""
    low, high, value = (
        math.log(end) if distribution.log else end for end in (distribution.low, distribution.high, value)
    )
    return (value - low) / (high - low)


def _at(distribution: FloatDistribution | IntDistribution, position: float) -> float:
    """The value there, or the nearest end; on the distribution's steps."""
    low, high = (math.log(end) if distribution.log else end for end in (distribution.low, distribution.high))
    value = low + min(max(position, 0), 1) * (high - low)
    return nearest_value(distribution, math.exp(value) if distribution.log else value)
