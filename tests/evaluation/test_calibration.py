"""Temperature and thresholds against slow references and sets whose answer is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import logsumexp
from sklearn.metrics import f1_score
from synthetic_logits import macro_f1, sample_logits, softmax

from pipeline.evaluation import calibration
from pipeline.evaluation.calibration import fit_calibration, fit_temperature, fit_thresholds, reweighting_line
from pipeline.evaluation.scores import score
from pipeline.processes import watched

seeds = st.integers(0, 2**32 - 1)


def rounded(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, C) with many ties, as half-precision logits have, and labels of some of the classes."""
    rng = np.random.default_rng(seed)
    images, classes = rng.integers(1, 40), rng.integers(2, 6)
    probabilities = softmax(np.round(rng.normal(size=(images, classes)) * 2) / 2)
    return probabilities, rng.integers(rng.integers(1, classes + 1), size=images)


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5])
def test_temperature_undoes_a_known_overconfidence(factor: float) -> None:
    assert fit_temperature(*sample_logits(0, 20_000, 6, factor)) == pytest.approx(factor, rel=0.03)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_no_temperature_of_a_fine_grid_is_more_probable(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = int(rng.integers(2, 60))
    logits, labels = sample_logits(seed, images, 4, rng.uniform(0.1, 10))
    fitted = fit_temperature(logits.astype(np.float32), labels)

    def log_densities(temperatures: np.ndarray) -> np.ndarray:
        scaled = logits / temperatures[:, None, None]
        log_likelihoods = (scaled - logsumexp(scaled, axis=2, keepdims=True))[:, np.arange(images), labels].sum(axis=1)
        return stats.gamma(5, scale=1 / 4).logpdf(1 / temperatures) + log_likelihoods

    [density] = log_densities(np.array([fitted]))
    assert density >= log_densities(np.geomspace(0.05, 20, 400)).max() - 1e-6 * images


@pytest.mark.parametrize("images", [20, 50])
def test_temperature_of_few_images_does_little_harm_to_new_ones(images: int) -> None:
    """Of a calibrated network; a third of the sets of 20 images have none that is wrong, a third one."""
    losses = []
    for seed in range(60):
        few, many = (sample_logits(number, size, 3, 1.0, spread=10) for number, size in ((seed, images), (99, 2000)))
        losses.append(score(calibration.softmax(many[0], fit_temperature(*few)), many[1]).loss)
    assert np.mean(losses) < 1.1 * score(softmax(many[0]), many[1]).loss


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e4, 1e30])
def test_temperature_stays_within_bounds_for_any_logits(scale: float) -> None:
    logits = np.array([[1, 0, 0], [0, 1, 0.5]], np.float32) * np.float32(scale)
    for labels in ([0, 1], [1, 0], [0, 2]):
        assert 0.05 <= fit_temperature(logits, np.array(labels)) <= 20
        assert 0.05 <= fit_temperature(logits[:1], np.array(labels[:1])) <= 20


def test_temperature_is_near_1_where_few_images_are_all_right_or_all_wrong() -> None:
    logits = 5 * np.eye(3, dtype=np.float32)
    assert 0.5 < fit_temperature(logits, np.arange(3)) < 1
    assert 1 < fit_temperature(logits, np.array([1, 2, 0])) < 5


@given(seeds)
def test_macro_f1_here_is_that_of_scikit_learn(seed: int) -> None:
    probabilities, labels = rounded(seed)
    named = {"labels": range(probabilities.shape[1]), "average": "macro", "zero_division": 0}
    assert macro_f1(labels, probabilities) == pytest.approx(f1_score(labels, probabilities.argmax(axis=1), **named))


def slow_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Coordinate ascent over the whole grid, a full evaluation per point; the nearest to 1 of the best."""
    grid = sorted((2 ** (step / 8) for step in range(-8, 9)), key=lambda t: (round(abs(np.log(t)), 9), t))
    thresholds = np.ones(probabilities.shape[1])
    for chosen in [*range(len(thresholds))] * 2:
        best = macro_f1(labels, probabilities / thresholds)
        tried = {}
        for candidate in grid:
            thresholds_now = thresholds.copy()
            thresholds_now[chosen] = candidate
            tried[candidate] = macro_f1(labels, probabilities / thresholds_now)
        winner = next(t for t in grid if tried[t] >= max(tried.values()) - 1e-9)
        if tried[winner] > best + 1e-9:
            thresholds[chosen] = winner
    return thresholds


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_thresholds_equal_a_slow_search(seed: int) -> None:
    probabilities, labels = rounded(seed)
    np.testing.assert_allclose(fit_thresholds(probabilities, labels), slow_thresholds(probabilities, labels))


@given(seeds)
def test_thresholds_never_lower_macro_f1_where_fitted(seed: int) -> None:
    probabilities, labels = rounded(seed)
    thresholds = fit_thresholds(probabilities, labels)
    assert macro_f1(labels, probabilities / thresholds) >= macro_f1(labels, probabilities) - 1e-12
    assert thresholds.min() >= 0.5 and thresholds.max() <= 2


def test_thresholds_of_many_classes_look_at_few_images_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all images anew for each class, a thousand classes take hours."""
    classes, images = 60, 1200
    labels = np.arange(images) % classes
    probabilities = softmax(np.random.default_rng(0).normal(size=(images, classes)) + 2 * np.eye(classes)[labels])
    best_two, looked_at, signs = calibration._Scaled._best_two, [], []

    def count(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        looked_at.append(columns.shape[1])
        return best_two(columns)

    monkeypatch.setattr(calibration._Scaled, "_best_two", staticmethod(count))
    with watched(lambda: signs.append(1)):
        thresholds = fit_thresholds(probabilities, labels)
    assert looked_at[0] == images and len(looked_at) - 1 >= (thresholds != 1).sum() > 20
    assert sum(looked_at[1:]) < 0.2 * images * len(looked_at), "a changed threshold concerns few images"
    assert len(signs) == 2 * classes


def test_thresholds_stay_1_where_nothing_helps() -> None:
    assert fit_thresholds(np.full((9, 3), 1 / 3), np.repeat([0, 1, 2], 3)).tolist() == [1, 1, 1]
    assert fit_thresholds(softmax(np.eye(4)), np.arange(4)).tolist() == [1, 1, 1, 1]
    assert fit_thresholds(softmax(np.eye(4)), np.array([1, 2, 3, 0])).tolist() == [1, 1, 1, 1]


def test_calibration_without_images_is_neutral() -> None:
    calibration = fit_calibration(np.empty((0, 3)), np.empty(0, np.int64))
    assert (calibration.temperature, calibration.thresholds) == (1.0, (1.0, 1.0, 1.0))


def test_what_reweighting_did_is_said_in_numbers_of_the_rarer_half() -> None:
    labels = np.array([2] * 90 + [0] * 6 + [1] * 4)
    probabilities = np.tile([0.2, 0.3, 0.5], (100, 1))
    weighted = {"data.sampler": "uniform", "data.sampler_power": 1.0, "loss.class_weights": 0.5}
    line = reweighting_line(weighted, probabilities, labels)
    assert "(class weights of power 0.5)" in line
    assert "gets 30.0% of the probability and has 4.0% of the validation images" in line
    both = reweighting_line(weighted | {"data.sampler": "balanced"}, probabilities, labels)
    assert "(balanced sampler of power 1, class weights of power 0.5)" in both
    for off in ({}, {"loss.class_weights": np.nan}, weighted | {"loss.class_weights": 0.0}):
        assert not reweighting_line(off, probabilities, labels)
