"""The pruner, asked by real Optuna studies; that the replay's rule says the same is tested there."""

from collections.abc import Sequence

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from pipeline.search.pruner import RecentTrialsPruner, goes_on


@pytest.mark.parametrize(
    ("epochs", "rungs"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4]), (8, [2, 3, 6]), (18, [3, 6, 12]), (60, [10, 20, 40])]
)
def test_it_judges_after_a_sixth_a_third_and_two_thirds(epochs: int, rungs: list[int]) -> None:
    assert RecentTrialsPruner(epochs).rungs == rungs


@pytest.mark.parametrize(("others", "kept"), [(0, 1), (3, 1), (4, 2), (7, 2), (8, 3), (11, 3)])
def test_a_quarter_goes_on_rounded_up(others: int, kept: int) -> None:
    ranks = [goes_on(place, [other for other in range(others + 1) if other != place]) for place in range(others + 1)]
    assert ranks == [False] * (others + 1 - kept) + [True] * kept


def test_equal_scores_all_go_on() -> None:
    assert goes_on(0.5, [0.5] * 11)
    assert not goes_on(0.5, [0.5] * 8 + [0.6] * 3)


def study_of(epochs: int, *others: Sequence[tuple[int, float]], **attributes: bool) -> optuna.Study:
    study = optuna.create_study(direction="maximize", pruner=RecentTrialsPruner(epochs))
    for values in others:
        study.add_trial(
            create_trial(state=TrialState.FAIL, intermediate_values=dict(values), user_attrs=dict(attributes))
        )
    return study


def verdicts(study: optuna.Study, scores: Sequence[tuple[int, float]]) -> list[int]:
    """The steps after which it would be pruned."""
    trial, said = study.ask(), []
    for step, score in scores:
        trial.report(score, step)
        if trial.should_prune():
            said.append(step)
    return said


def test_it_judges_at_the_rungs_and_nowhere_else() -> None:
    better = [(step, 0.9) for step in range(1, 18)]
    assert verdicts(study_of(18, better), [(step, 0.1) for step in range(1, 18)]) == [3, 6, 12]
    assert verdicts(study_of(18, better), [(step, 0.9) for step in range(1, 18)]) == []
    assert verdicts(study_of(18), [(step, 0.1) for step in range(1, 18)]) == [], "nobody came before"


def test_only_the_last_few_that_came_to_the_rung_are_compared() -> None:
    good, poor, short = [(3, 0.9)], [(3, 0.1)], [(1, 0.9), (2, 0.9)]
    assert verdicts(study_of(18, *[good] * 20, *[poor] * 9), [(3, 0.5)]) == [], "third, behind two of the good ones"
    assert verdicts(study_of(18, *[good] * 20, *[poor] * 8), [(3, 0.5)]) == [3]
    assert verdicts(study_of(18, *[good] * 20, *[poor] * 9, *[short] * 5), [(3, 0.5)]) == []


def test_what_was_asked_again_is_not_counted_twice() -> None:
    good = [(3, 0.9)]
    assert verdicts(study_of(18, *[good] * 3), [(3, 0.5)]) == [3]
    assert verdicts(study_of(18, *[good] * 3, asked_again=True), [(3, 0.5)]) == []


def test_a_step_beyond_a_rung_stands_for_it_until_the_next() -> None:
    """A short training's steps are long: it is compared where it stands, not where it never was."""
    others = [[(3, 0.5), (6, 0.8)]] * 4
    assert verdicts(study_of(18, *others), [(4, 0.4)]) == [4]
    assert verdicts(study_of(18, *others), [(4, 0.6)]) == []
    assert verdicts(study_of(18, *others), [(9, 0.6)]) == [9], "with the sixth step's, not the third's"
    leaps = [[(9, 0.1)]] * 4
    assert verdicts(study_of(18, *leaps), [(3, 0.05), (6, 0.05)]) == [6], "who leapt over a rung isn't there"
