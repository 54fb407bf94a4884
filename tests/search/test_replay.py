"""Pruning replayed on curves: the rules are Optuna's own, and the numbers mean what they say."""

import math
from collections.abc import Callable

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.pruners import BasePruner, SuccessiveHalvingPruner
from optuna.trial import TrialState

from pipeline.search.replay import STRATEGIES, Estimate, Never, Replayed, Rule, quantile, replay_all, rule, simulate

Make = Callable[[int, int], BasePruner]


class Optunas:
    """A Rule that asks a real Optuna study."""

    def __init__(self, pruner: BasePruner, name: str, trials: int):
        storage = optuna.storages.InMemoryStorage()
        self.study = optuna.create_study(storage=storage, direction="maximize", pruner=pruner, study_name=name)
        self.trials = [self.study.ask() for _ in range(trials)]

    def prune(self, trial: int, epoch: int, score: float) -> bool:
        self.trials[trial].report(score, epoch)
        if pruned := self.trials[trial].should_prune():
            self.study.tell(trial, state=TrialState.PRUNED)
        return pruned

    def complete(self, trial: int) -> None:
        self.study.tell(trial, 1.0)


def rising_curves(seed: int, recipes: int = 40, epochs: int = 12) -> np.ndarray:
    """Curves on a coarse grid, so that scores tie; some cross, some diverge."""
    random = np.random.RandomState(seed)
    height, speed = random.uniform(0.2, 1, (recipes, 1)), random.uniform(0.5, 8, (recipes, 1))
    curves = height * (1 - np.exp(-np.arange(1, epochs + 1) / speed)) + random.normal(0, 0.03, (recipes, epochs))
    curves = curves.clip(0, 1).round(2)
    for row in random.choice(recipes, recipes // 10, replace=False):
        curves[row, random.randint(epochs) :] = np.nan
    return curves


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES.keys())
def test_the_rules_give_the_verdicts_of_optunas_pruners(make: Make, workers: int) -> None:
    for seed in range(3):
        curves = rising_curves(seed)
        name = f"order {seed}"
        theirs = Optunas(make(*curves.shape), name, len(curves))
        rows = curves.tolist()
        assert simulate(rows, rule(make(*curves.shape), name), workers) == simulate(rows, theirs, workers)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.sampled_from([25, 50, 70, 90]))
def test_quantiles_are_numpys_to_the_last_bit(values: list[float], percent: float) -> None:
    assert quantile(sorted(values), percent / 100) == np.percentile(values, percent)


def test_most_strategies_prune_here_or_the_test_above_would_show_nothing() -> None:
    curves = rising_curves(0)
    whole = simulate(curves.tolist(), Never(), 1)[0]
    for name, make in STRATEGIES.items():
        used, completed = simulate(curves.tolist(), rule(make(*curves.shape), "a"), 1)
        assert (used == whole) == (name == "no pruning")
        assert completed


class Log:
    """A Rule that prunes recipe 1 after its first epoch and remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def prune(self, trial: int, epoch: int, score: float) -> bool:
        self.told.append((trial, epoch))
        return trial == 1

    def complete(self, trial: int) -> None:
        self.told.append((trial, -1))


def test_workers_go_on_with_the_next_recipe_as_soon_as_they_are_free() -> None:
    curves = [[0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0.1, math.nan, math.nan], [0.1, 0.2, 0.3]]
    one, two = Log(), Log()
    assert simulate(curves, one, 1) == (3 + 1 + 2 + 3, [0, 3])
    assert one.told == [(0, 1), (0, 2), (0, -1), (1, 1), (2, 1), (3, 1), (3, 2), (3, -1)]
    assert simulate(curves, two, 2) == (3 + 1 + 2 + 3, [0, 3])
    assert two.told == [(0, 1), (1, 1), (0, 2), (2, 1), (0, -1), (3, 1), (3, 2), (3, -1)]


def found(curves: np.ndarray, **more: np.ndarray) -> dict[tuple[str, str, int], Replayed]:
    lines = replay_all({"plain": curves, **more}, orders=10, resamples=10)
    return {(line.judged_by, line.strategy, line.workers): line for line in lines}


def test_without_pruning_all_is_used_and_nothing_lost() -> None:
    lines = found(rising_curves(0))
    used = [lines["plain", "median from 1/6", workers].epochs_used.value for workers in (1, 2, 4)]
    assert used == sorted(set(used)), "more workers know less when they decide"
    for workers in (1, 2, 4):
        line = lines["plain", "no pruning", workers]
        assert line.epochs_used == Estimate(1, 1, 1)
        assert line.regret == Estimate(0, 0, 0)


def test_curves_that_never_cross_cost_nothing_to_prune() -> None:
    """The best is the best at every epoch, so no rule ends it."""
    curves = np.linspace(0.1, 0.9, 30)[:, None] * np.linspace(0.5, 1, 12)
    for line in found(curves).values():
        assert line.rank_correlation.value == pytest.approx(1)
        assert line.regret.value == line.regret.high == 0
        assert (line.epochs_used.value < 0.8) == (line.strategy != "no pruning")


def test_curves_that_all_cross_are_pruned_wrongly_and_the_regret_says_by_how_much() -> None:
    late, share = np.linspace(0.1, 0.9, 30)[:, None], np.linspace(0, 1, 12)
    lines = found((1 - late) * (1 - share) + late * share, averaged=late * np.linspace(0.5, 1, 12))
    for (judge, strategy, _), line in lines.items():
        if strategy.startswith("halving"):
            assert line.rank_correlation.value == pytest.approx(-1 if judge == "plain" else 1)
            assert (line.regret.low > 0.05) == (judge == "plain")
            assert line.regret.low <= line.regret.value <= line.regret.high or judge == "averaged"


def test_a_study_in_which_later_recipes_are_better_prunes_less_than_one_in_any_order() -> None:
    curves = np.linspace(0.1, 0.9, 60)[:, None] * np.linspace(0.5, 1, 12)

    def used(**more: float) -> dict[str, float]:
        lines = replay_all({"plain": curves}, orders=20, resamples=2, **more)
        return {line.strategy: line.epochs_used.value for line in lines if line.workers == 1}

    any_order, learning, sorted_order = used(), used(rise=0.75), used(rise=1000)
    recent, halving = "best quarter of the last 12 from 1/6", "halving by 3 from 1/6"
    for strategy in (recent, halving):
        assert any_order[strategy] < learning[strategy] < sorted_order[strategy] == 1
    assert learning[recent] - any_order[recent] < 0.6 * (learning[halving] - any_order[halving])


def test_of_a_short_study_so_many_recipes_are_drawn() -> None:
    curves = np.repeat(np.linspace(0.1, 0.9, 30)[:, None], 6, axis=1)
    lines = replay_all({"plain": curves}, orders=50, resamples=2, trials=3)
    assert all(line.epochs_used.value == 1 for line in lines), "the first three are whole"
    assert all(line.regret.value == 0 for line in lines), "beside the best of the same three"


def test_the_same_seed_gives_the_same_numbers() -> None:
    curves = rising_curves(2, recipes=12, epochs=6)
    first, again, other = (replay_all({"plain": curves}, 5, seed, resamples=5) for seed in (0, 0, 1))
    assert first == again != other


def test_one_that_diverges_after_the_first_decision_ranks_last() -> None:
    curves = np.array([[0.1, 0.1, 0.1], [0.2, 0.2, 0.2], [0.3, 0.3, math.nan], [math.nan] * 3])
    correlation = found(curves)["plain", "no pruning", 1].rank_correlation.value
    assert correlation == pytest.approx(-0.5)  # early 1, 2, 3 and late 2, 3, 1


def test_recipes_that_all_diverge_complete_nothing() -> None:
    line = found(np.full((4, 3), math.nan))["plain", "median from 1/3", 2]
    assert (line.epochs_used.value, line.regret.value, line.rank_correlation.value) == (1, 0, 0)


def test_the_first_trials_go_on_whole_and_others_are_held_against_them() -> None:
    """Halving by 3 from epoch 1, and again at the third: the second, worse than the first, goes on, and the third not."""
    curves = [[0.5, 0.5, 0.5, 0.5], [0.4, 0.9, 0.9, 0.9], [0.45, 0.9, 0.9, 0.9], [0.6, 0.6, 0.6, 0.6]]

    def halving() -> Rule:
        return rule(SuccessiveHalvingPruner(1, 3), "")

    assert simulate(curves, halving(), 1) == (4 + 1 + 1 + 4, [0, 3])
    assert simulate(curves, halving(), 1, whole=2) == (4 + 4 + 1 + 3, [0, 1]), "the last meets the second there"
