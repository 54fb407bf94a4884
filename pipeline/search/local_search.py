"""The default sampler: each new recipe is one of the best so far, with a few of its parameters changed.

A study is given strong recipes to start from, and has about twenty trials for fifteen parameters. That is too few to learn
where in the whole space to draw, and beside a good recipe there are better ones (what this adds to the starts:
studies/search/README.md). An evolution strategy by mutation alone, as in Real et al. 2019 (arXiv 1802.01548).
"""

import math
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

import optuna
from numpy.random import RandomState
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, TrialState

from pipeline.search.short_trials import score_of
from pipeline.search.space_check import ScriptedTrial, nearest_value
from pipeline.search.trial_attributes import TrialAttributes, is_feasible

MUTATIONS = 2.0  # parameters that change in a trial, on average; at least one does
STEP = 0.2  # standard deviation of a change, as a share of the range, or of the range of the logarithm
NEXT = 0.5  # probability of the parent's being not the best recipe but one below; again for each next
MAX_DRAWS = 100  # before a trial is drawn at random, as all that is near was tried


class SpaceExhausted(Exception):
    """There is no recipe left to draw."""


class LocalSearchSampler(RandomSampler):
    """Changes the best recipes; draws at random while no trial has ended, and the first `n_startup_trials` in any case.

    What the parent lacks, as it has another kind of optimizer, comes from the best recipe that has it. `ask` asks a trial
    for the parameters of the space: only so is it known which recipe a change makes.
    """

    def __init__(self, ask: Callable[[Any], object], n_startup_trials: int = 0, seed: int | None = None):
        super().__init__(seed)
        self._ask, self._n_startup_trials = ask, n_startup_trials
        # Number of the trial that is being drawn -> its parameters, None where no recipe is left.
        self._drawn: dict[int, dict[str, Any] | None] = {}

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Draw a recipe; one that there is already is drawn again, at random where all near the best was tried.

        Stops the study where no other is left; a trial that asks for one then raises SpaceExhausted.
        """
        trials = study.get_trials(deepcopy=False)
        recipes = ranked(trials) if trial.number >= self._n_startup_trials else []
        tried = [other.params for other in trials]
        parents = [recipes] * MAX_DRAWS * bool(recipes) + [[]] * MAX_DRAWS
        drawn = (self._draw(some, study, trial) for some in parents)
        found = next((params for params in drawn if params not in tried), None)
        self._drawn = {trial.number: found}
        if found is None:
            study.stop()

    def _draw(self, recipes: Sequence[FrozenTrial], study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        """One of the recipes, the best first, with a few parameters changed; at random where there are none."""
        sources = [(recipe.distributions, recipe.params) for recipe in recipes]
        if sources:
            rng = self._rng.rng
            distributions, params = sources.pop(min(rng.geometric(1 - NEXT), len(sources)) - 1)
            names = sorted(name for name, asked in distributions.items() if not asked.single())
            chosen = rng.choice(names, min(1 + rng.poisson(MUTATIONS - 1), len(names)), replace=False)
            changes = {name: changed_value(distributions[name], params[name], rng) for name in chosen}
            sources.insert(0, (distributions, params | changes))

        def choose(name: str, asked: BaseDistribution) -> Any:
            """The value of the first recipe that has the parameter, with this range."""
            for distributions, params in sources:
                if distributions.get(name) == asked:
                    return params[name]
            return super(LocalSearchSampler, self).sample_independent(study, trial, name, asked)

        drawn = ScriptedTrial({}, choose)
        self._ask(drawn)
        return drawn.params

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """As drawn."""
        drawn = self._drawn[trial.number]
        if drawn is None:
            raise SpaceExhausted
        if param_name in drawn:
            return drawn[param_name]
        return super().sample_independent(study, trial, param_name, param_distribution)


def ranked(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials whose recipes can be parents, best first, by the score that they have in full.

    A recipe that was only trained short is credited with what those trained both ways gained on average. Before there is
    one of these, short trials are compared with each other alone; but where a study began with trials in full, as without
    pruning, with what the mean of these is above their own. One that failed or is infeasible in full is no parent.
    """
    attributes = {trial.number: TrialAttributes.of(trial) for trial in trials}
    unfit = {
        attributes[trial.number].full_of
        for trial in trials
        if not is_feasible(trial) or (trial.state is TrialState.FAIL and not attributes[trial.number].requeued)
    }
    feasible = [trial for trial in trials if is_feasible(trial) and trial.number not in unfit]
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
    return distribution.to_external_repr(nearest_value(distribution, math.exp(value) if distribution.log else value))
