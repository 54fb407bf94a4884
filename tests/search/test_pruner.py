"""The pruner in real Optuna studies."""

from collections.abc import Sequence

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from pipeline.search.pruner import RecentTrialsPruner, continues


@pytest.mark.parametrize(
    ("epochs", "rungs"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4]), (8, [2, 3, 6]), (18, [3, 6, 12]), (60, [10, 20, 40])]
)
def test_rungs_are_a_sixth_a_third_and_two_thirds(epochs: int, rungs: list[int]) -> None:
    assert RecentTrialsPruner(epochs).rungs == rungs


@pytest.mark.parametrize(("others", "kept"), [(0, 1), (3, 1), (4, 2), (7, 2), (8, 3), (11, 3)])
def test_a_quarter_continues_rounded_up(others: int, kept: int) -> None:
    ranks = [continues(place, [other for other in range(others + 1) if other != place]) for place in range(others + 1)]
    assert ranks == [False] * (others + 1 - kept) + [True] * kept


def test_equal_scores_all_continue() -> None:
    assert continues(0.5, [0.5] * 11)
    assert not continues(0.5, [0.5] * 8 + [0.6] * 3)


def study_of(epochs: int, *others: Sequence[tuple[int, float]], **attributes: bool) -> optuna.Study:
    study = optuna.create_study(direction="maximize", pruner=RecentTrialsPruner(epochs))
    for values in others:
        study.add_trial(
            create_trial(state=TrialState.FAIL, intermediate_values=dict(values), user_attrs=dict(attributes))
        )
    return study


def pruned_at(study: optuna.Study, scores: Sequence[tuple[int, float]]) -> list[int]:
    """The steps after which it would be pruned."""
    trial, pruned = study.ask(), []
    for step, score in scores:
        trial.report(score, step)
        if trial.should_prune():
            pruned.append(step)
    return pruned


def test_pruning_happens_at_rungs_only() -> None:
    better = [(step, 0.9) for step in range(1, 18)]
    assert pruned_at(study_of(18, better), [(step, 0.1) for step in range(1, 18)]) == [3, 6, 12]
    assert pruned_at(study_of(18, better), [(step, 0.9) for step in range(1, 18)]) == []
    assert pruned_at(study_of(18), [(step, 0.1) for step in range(1, 18)]) == [], "no other trial reached it before"


def test_only_the_last_trials_at_a_rung_are_compared() -> None:
    good, poor, short = [(3, 0.9)], [(3, 0.1)], [(1, 0.9), (2, 0.9)]
    assert pruned_at(study_of(18, *[good] * 20, *[poor] * 9), [(3, 0.5)]) == [], "third, behind two of the good ones"
    assert pruned_at(study_of(18, *[good] * 20, *[poor] * 8), [(3, 0.5)]) == [3]
    assert pruned_at(study_of(18, *[good] * 20, *[poor] * 9, *[short] * 5), [(3, 0.5)]) == []


def test_requeued_trials_are_not_counted_twice() -> None:
    good = [(3, 0.9)]
    assert pruned_at(study_of(18, *[good] * 3), [(3, 0.5)]) == [3]
    assert pruned_at(study_of(18, *[good] * 3, requeued=True), [(3, 0.5)]) == []


def test_step_beyond_a_rung_counts_for_it_until_the_next() -> None:
    """A short training's steps are long: it is compared where it is, not at rungs that it leapt over."""
    others = [[(3, 0.5), (6, 0.8)]] * 4
    assert pruned_at(study_of(18, *others), [(4, 0.4)]) == [4]
    assert pruned_at(study_of(18, *others), [(4, 0.6)]) == []
    assert pruned_at(study_of(18, *others), [(9, 0.6)]) == [9], "with the sixth step's, not the third's"
    leaps = [[(9, 0.1)]] * 4
    assert pruned_at(study_of(18, *leaps), [(3, 0.05), (6, 0.05)]) == [6], "trials that leapt over a rung don't count"
