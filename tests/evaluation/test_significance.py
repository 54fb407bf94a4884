"""Tests of differences against other implementations, by hand and by repetition."""

from collections.abc import Callable
from itertools import product
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_1samp
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

from pipeline.evaluation.significance import (
    f1_macro_error,
    image_step,
    mcnemar,
    mcnemar_one_sided,
    paired_difference,
    paired_t,
    sample,
    small_split_line,
    wilson,
)


@pytest.mark.parametrize(("right", "images"), [(0, 1), (1, 2), (7, 7), (50, 93), (4500, 5000)])
def test_wilson_is_scipys(right: int, images: int) -> None:
    expected = binomtest(right, images).proportion_ci(0.95, method="wilson")
    assert wilson(right, images) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_split_is_too_small_until_its_interval_is_20_points() -> None:
    assert small_split_line(2, 0.1) == (
        "caution: 2 validation images say little: an accuracy of 50 % among them has a 95 % interval from 9 to 91 % "
        "(Wilson); 93 narrow it to 20 points, at data.validation_fraction = 0.1 that takes 930 images in all"
    )
    assert "93 narrow it" in str(small_split_line(92, 0.25)) and small_split_line(93, 0.25) is None


def test_mcnemar_is_the_two_sided_binomial_test() -> None:
    for better, worse in [*product(range(16), repeat=2), (31, 10), (500, 431), (4000, 4200)]:
        if better + worse:
            expected = binomtest(better, better + worse, 0.5).pvalue
            assert mcnemar(better, worse) == pytest.approx(expected, rel=1e-9), (better, worse)


def test_mcnemar_by_hand() -> None:
    assert mcnemar(10, 2) == pytest.approx(2 * (comb(12, 0) + comb(12, 1) + comb(12, 2)) / 2**12)
    assert mcnemar(2, 10) == mcnemar(10, 2)


def test_methods_that_win_equally_often_do_not_differ() -> None:
    assert mcnemar(0, 0) == mcnemar(1, 1) == mcnemar(50, 50) == mcnemar(1, 0) == 1.0


def predictions(seed: int, images: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of unequally frequent classes, and two predictions that are equally good and often agree."""
    rng = np.random.default_rng(seed)
    frequency = np.arange(1, classes + 1) / np.arange(1, classes + 1).sum()
    labels = rng.choice(classes, size=images, p=frequency)
    shared = rng.random(images) < 0.7
    first, second = (
        np.where(shared ^ (rng.random(images) < 0.1), labels, rng.integers(classes, size=images)) for _ in range(2)
    )
    return labels, first, second


def f1_difference(labels: np.ndarray, first: np.ndarray, second: np.ndarray, classes: int) -> float:
    scores = (
        f1_score(labels, found, labels=range(classes), average="macro", zero_division=0) for found in (second, first)
    )
    return next(scores) - next(scores)


def test_macro_f1_error_agrees_with_the_bootstrap() -> None:
    labels, first, second = predictions(0, 800, 5)
    rng = np.random.default_rng(1)
    drawn = [rng.integers(len(labels), size=len(labels)) for _ in range(500)]
    differences = [f1_difference(labels[rows], first[rows], second[rows], 5) for rows in drawn]
    assert f1_macro_error(labels, first, second, 5) == pytest.approx(np.std(differences), rel=0.1)


def test_macro_f1_error_agrees_with_the_jackknife() -> None:
    """Closer than the bootstrap's own chance allows."""
    labels, first, second = predictions(0, 500, 5)
    whole = np.arange(len(labels))
    without = np.array([f1_difference(*(x[whole != out] for x in (labels, first, second)), 5) for out in whole])
    jackknife = np.sqrt((len(labels) - 1) * without.var())
    assert f1_macro_error(labels, first, second, 5) == pytest.approx(jackknife, rel=0.02)


def test_equally_good_predictions_rarely_differ_in_macro_f1() -> None:
    alarms = 0
    for seed in range(300):
        labels, first, second = predictions(seed, 600, 4)
        alarms += abs(f1_difference(labels, first, second, 4)) > 1.96 * f1_macro_error(labels, first, second, 4)
    assert 3 <= alarms <= 30  # 15 expected at 5 %


@pytest.mark.parametrize(
    ("objective", "metric"), [("val/accuracy", accuracy_score), ("val/balanced_accuracy", balanced_accuracy_score)]
)
def test_a_paired_difference_is_that_of_the_objective(objective: str, metric: Callable[..., float]) -> None:
    """With the error that a bootstrap within the classes has, of which one is rare."""
    labels, first, second = predictions(0, 800, 5)
    labels, first, second = (x[(labels > 0) | (np.arange(800) % 4 == 0)] for x in (labels, first, second))
    difference, error = paired_difference(objective, labels, first, second, 5)
    assert difference == pytest.approx(metric(labels, first) - metric(labels, second))
    rng, classes = np.random.default_rng(1), [np.flatnonzero(labels == label) for label in range(5)]
    gains = (labels == first).astype(float) - (labels == second)
    drawn = [[gains[rng.choice(images, len(images))] for images in classes] for _ in range(500)]
    if objective == "val/balanced_accuracy":
        spread = np.std([np.mean([of.mean() for of in draw]) for draw in drawn])
    else:
        spread = gains.std() / np.sqrt(len(gains))
    assert error == pytest.approx(spread, rel=0.1)


def test_equal_predictions_have_no_macro_f1_error() -> None:
    labels, first, _ = predictions(0, 50, 3)
    assert f1_macro_error(labels, first, first, 7) == 0


def test_sample_mean_has_the_interval_of_students_t() -> None:
    values = [0.91, 0.93, 0.92, 0.95]
    found, expected = sample(values), ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.n, found.mean, found.sd) == (4, pytest.approx(0.9275), pytest.approx(np.std(values, ddof=1)))
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    wider = sample(values, least_sd=2 * np.std(values, ddof=1))
    assert wider.high is not None and wider.high - wider.mean == pytest.approx(2 * (expected.high - 0.9275))
    assert wider.sd == found.sd
    assert sample([0.5]).sd is None and sample([0.5]).low is None


def test_paired_t_test_equals_scipys_above_the_least_deviation() -> None:
    differences = np.random.default_rng(0).normal(0.002, 0.003, 6)
    p = paired_t(differences.tolist(), 1e-9)
    assert p == pytest.approx(ttest_1samp(differences, 0).pvalue)
    assert paired_t((-differences).tolist(), 1e-9) == pytest.approx(p)
    assert paired_t(differences.tolist(), 0.01) > p
    assert paired_t([0.01, 0.01, 0.01], 0.01) == pytest.approx(0.2254, abs=1e-4), "t = sqrt(3), two degrees of freedom"
    assert paired_t([0.3], 0.01) == 1


def test_overlap_of_folds_widens_intervals_and_tests() -> None:
    values = [0.7, 0.72, 0.69, 0.74, 0.7]
    plain, folds = sample(values), sample(values, overlap=1 / 4)
    assert (folds.mean, folds.sd) == (plain.mean, plain.sd) and folds.high and plain.high
    assert (folds.high - folds.mean) / (plain.high - plain.mean) == pytest.approx((1 + 5 / 4) ** 0.5)
    assert paired_t(values, 1e-3, overlap=1 / 4) > paired_t(values, 1e-3)


def test_given_split_that_is_small_names_no_fraction() -> None:
    assert str(small_split_line(2, None)).endswith("93 narrow it to 20 points")


@given(gained=st.integers(0, 60), lost=st.integers(0, 60))
def test_mcnemar_p_value_equals_binomial_test(gained: int, lost: int) -> None:
    expected = binomtest(gained, gained + lost, alternative="greater").pvalue if gained + lost else 1.0
    assert mcnemar_one_sided(gained, lost) == pytest.approx(expected)


@pytest.mark.parametrize("objective", ["val/accuracy", "val/balanced_accuracy", "val/f1_macro"])
def test_no_image_moves_a_score_by_more_than_the_step(objective: str) -> None:
    labels = np.repeat([0, 1, 2], [30, 8, 2])
    random = np.random.default_rng(0)
    answers = np.where(random.random(40) < 0.8, labels, random.integers(3, size=40))
    moves = []
    for image in range(40):
        changed = answers.copy()
        changed[image] = labels[image] if answers[image] != labels[image] else (labels[image] + 1) % 3
        moves.append(abs(paired_difference(objective, labels, changed, answers, 3)[0]))
    step = image_step(objective, labels, 3)
    assert max(moves) <= step * 1.1 and step <= 3 * max(moves)
