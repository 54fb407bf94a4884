"""Parents, and how recipes beside them are drawn."""

from typing import Any

import optuna
import pytest
from numpy.random import RandomState
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from pipeline.search.local_search import LocalSearchSampler, SpaceExhausted, changed_value, ranked
from pipeline.search.optuna_internals import allow_stop, was_stopped
from pipeline.search.trial_attributes import TrialAttributes

RATE = FloatDistribution(1e-3, 1.0, log=True)


def ended(number: int, score: float, **attributes: Any) -> FrozenTrial:
    """A short trial that ended, or one in full where the attributes say so."""
    values = TrialAttributes(**{"short": True, **attributes})
    state = TrialState.PRUNED if values.short else TrialState.COMPLETE
    trial = create_trial(
        state=state,
        intermediate_values={5: score},
        value=None if values.short else score,
        user_attrs=values.to_optuna(),
    )
    trial.number = number
    return trial


def test_parents_are_ranked_by_their_score_in_full() -> None:
    control, worse, better = ended(0, 0.6, short=False, control=True), ended(1, 0.5), ended(2, 0.55)
    assert ranked([control, worse, better]) == [better, worse], "no gain is known yet: short ones alone"
    assert ranked([control]) == [control]
    in_full = ended(3, 0.7, short=False, full_of=2)
    assert ranked([control, worse, better, in_full]) == [better, worse, control], "0.70, 0.50 + 0.15, 0.60"
    disappointing = ended(3, 0.57, short=False, full_of=2)
    assert ranked([control, worse, better, disappointing]) == [control, better, worse]


def test_trials_in_full_are_parents_beside_short_ones() -> None:
    """As in a study that began without pruning."""
    control = ended(0, 0.9, short=False, control=True)
    good, bad = ended(1, 0.8, short=False), ended(2, 0.6, short=False)
    best, worst = ended(3, 0.55), ended(4, 0.25)
    assert ranked([control, good, bad, best, worst]) == [control, best, good, bad, worst], "0.55 + 0.3, 0.25 + 0.3"


def test_trials_that_tell_no_score_are_no_parents() -> None:
    infeasible = ended(0, 0.9)
    infeasible.system_attrs = {"constraints:model/parameters": 1.0}
    in_full = ended(1, 0.95, short=False, full_of=0)
    in_full.system_attrs = {"constraints:model/latency_ms": 1.0}
    assert ranked([ended(0, 0.9), in_full]) == []
    diverged = TrialAttributes(full_of=0).to_optuna(), TrialAttributes(full_of=0, requeued=True).to_optuna()
    failed, requeued = (create_trial(state=TrialState.FAIL, user_attrs=attributes) for attributes in diverged)
    assert ranked([ended(0, 0.9), failed]) == [] != ranked([ended(0, 0.9), requeued])
    stopped = create_trial(state=TrialState.PRUNED, intermediate_values={1: 0.9})  # by a pruner, when its rate was high
    assert (
        ranked([infeasible, stopped, create_trial(state=TrialState.FAIL), create_trial(state=TrialState.PRUNED)]) == []
    )


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Two kinds, each with a rate of its own, and much else."""
    kind = trial.suggest_categorical("kind", ["a", "b"])
    rate = trial.suggest_float(f"rate@{kind}", 1e-3, 1.0, log=True)
    return {"kind": kind, "rate": rate, **{f"x{i}": trial.suggest_float(f"x{i}", 0, 1) for i in range(8)}}


def study_with(*given: dict[str, Any]) -> optuna.Study:
    """Each given trial is better than the one before."""
    study = optuna.create_study(direction="maximize", sampler=LocalSearchSampler(space, n_startup_trials=2, seed=0))
    for score, params in enumerate(given):
        study.enqueue_trial(params)
        trial = study.ask()
        space(trial)
        study.tell(trial, score)
    return study


A = {"kind": "a", "rate@a": 0.01, **{f"x{i}": 0.5 for i in range(8)}}
B = {"kind": "b", "rate@b": 0.1, **{f"x{i}": 0.25 for i in range(8)}}


def test_a_new_trial_differs_from_its_parent_in_a_few_parameters() -> None:
    study = study_with(B, A)
    parents, differing = study.trials[:2], []
    for _ in range(300):
        trial = study.ask()
        space(trial)
        differing.append([_differing(trial.params, parent.params) for parent in parents])
        study.tell(trial, state=TrialState.FAIL)
    counts = [min(pair) for pair in differing]
    assert min(counts) >= 1
    assert 1.7 < sum(counts) / 300 < 2.4
    of_best = sum(pair[1] < pair[0] for pair in differing) / 300
    assert 0.4 < of_best < 0.6, "half of them; the rest come from the second, the last one"


def _differing(first: dict[str, Any], second: dict[str, Any]) -> int:
    return sum(first.get(name) != second.get(name) for name in first)


def test_what_the_parent_lacks_comes_from_the_best_that_has_it() -> None:
    study = study_with(B, A)
    rates = []
    for _ in range(100):
        trial = study.ask()
        drawn = space(trial)
        if drawn["kind"] == "b":
            rates.append(drawn["rate"])
        study.tell(trial, state=TrialState.FAIL)
    assert len(rates) > 10 and rates.count(0.1) > len(rates) / 2, "B's rate, unless it was changed"


def test_a_change_of_the_parent_is_not_used_in_another_range() -> None:
    """A range that depends on another parameter, by one name."""

    def ask(trial: Any) -> tuple[float, float]:
        low = trial.suggest_categorical("low", [1, 10])
        return low, trial.suggest_float("rate", low, 2 * low)

    study = optuna.create_study(direction="maximize", sampler=LocalSearchSampler(ask, n_startup_trials=4, seed=0))
    for _ in range(40):
        trial = study.ask()
        low, rate = ask(trial)
        assert low <= rate <= 2 * low
        study.tell(trial, -low + rate / 100)


def test_it_draws_at_random_where_nothing_ended_or_too_early() -> None:
    for study in (study_with(), study_with(A)):
        trial = study.ask()
        space(trial)
        assert _differing(trial.params, A) > 7


@pytest.mark.parametrize(
    ("distribution", "value"),
    [
        (RATE, 0.9),
        (FloatDistribution(0, 0.5, step=0.1), 0.3),
        (FloatDistribution(0, 0.5, step=0.5), 0.5),
        (IntDistribution(0, 4, step=2), 4),
        (IntDistribution(1, 64, log=True), 1),
        (CategoricalDistribution((0, 1e-4, 5e-4)), 5e-4),
        (CategoricalDistribution((False, True)), True),
    ],
)
def test_a_changed_value_is_another_one_of_the_range(distribution: BaseDistribution, value: Any) -> None:
    rng = RandomState(0)
    values = [changed_value(distribution, value, rng) for _ in range(50)]
    assert all(new != pytest.approx(value) for new in values)
    assert all(distribution._contains(distribution.to_internal_repr(new)) for new in values)


def test_numbers_change_by_a_fifth_of_the_range() -> None:
    rng = RandomState(0)
    values = [changed_value(RATE, 10**-1.5, rng) for _ in range(2000)]
    within = sum(10**-2.1 < value < 10**-0.9 for value in values) / 2000
    assert 0.64 < within < 0.72, "one standard deviation of 0.2 of three decades"


def test_no_recipe_is_tried_twice() -> None:
    def ask(trial: Any) -> int:
        return trial.suggest_int("x", 0, 24)

    study = optuna.create_study(direction="maximize", sampler=LocalSearchSampler(ask, seed=0))
    for _ in range(25):
        trial = study.ask()
        study.tell(trial, -abs(ask(trial) - 12))
    assert len({trial.params["x"] for trial in study.trials}) == 25
    assert not was_stopped(study)
    allow_stop(study)
    trial = study.ask()
    with pytest.raises(SpaceExhausted):
        ask(trial)
    assert was_stopped(study), "nothing is left"


def test_no_recipe_is_tried_twice_where_a_change_of_kind_drops_parameters() -> None:
    """A's other kind is the same recipe, whatever rate A has."""

    def ask(trial: Any) -> str:
        kind: str = trial.suggest_categorical("kind", ["a", "b"])
        trial.suggest_int(f"rate@{kind}", 1, 8, log=True)
        return kind

    study = optuna.create_study(direction="maximize", sampler=LocalSearchSampler(ask, seed=0))
    for _ in range(16):
        trial = study.ask()
        study.tell(trial, ask(trial) == "a")
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 16
    assert all(isinstance(trial.params[f"rate@{trial.params['kind']}"], int) for trial in study.trials)
