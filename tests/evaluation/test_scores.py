"""Scores against scikit-learn and slow references."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name
from sklearn import metrics

from pipeline.evaluation.scores import (
    accuracy_from,
    balanced_accuracy_from,
    confusion_matrix,
    f1_from,
    f1_macro_from,
    metric_names,
    most_confident,
    per_class_table,
    reliability,
    score,
)

seeds = st.integers(0, 2**32 - 1)


def drawn(seed: int, sharpness: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Random float32 probabilities of 1 to 60 images over 2 to 9 classes, and labels of some of the classes only."""
    rng = np.random.default_rng(seed)
    images, classes = rng.integers(1, 61), rng.integers(2, 10)
    logits = rng.normal(size=(images, classes)) * rng.uniform(0, sharpness)
    logits[:, rng.integers(classes)] -= 100  # never predicted
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)
    return probabilities, rng.integers(rng.integers(1, classes + 1), size=images)


def slow_ece(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> float:
    """Guo et al. 2017, equations 2, 3 and 5, a bin at a time."""
    total = 0.0
    edges = np.linspace(0, 1, bins + 1)
    for low, high in pairwise(edges):
        inside = [row for row in range(len(labels)) if low < float(max(probabilities[row])) <= high]
        if inside:
            right = [float(np.argmax(probabilities[row]) == labels[row]) for row in inside]
            sure = [float(max(probabilities[row])) for row in inside]
            total += len(inside) / len(labels) * abs(np.mean(right) - np.mean(sure))
    return total


@given(seeds)
def test_all_scores_agree_with_scikit_learn(seed: int) -> None:
    probabilities, labels = drawn(seed)
    classes, predictions = range(probabilities.shape[1]), probabilities.argmax(axis=1)
    scores = score(probabilities, labels)
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        labels, predictions, labels=classes, zero_division=0
    )
    assert scores.accuracy == pytest.approx(metrics.accuracy_score(labels, predictions))
    assert scores.f1_macro == pytest.approx(
        metrics.f1_score(labels, predictions, labels=classes, average="macro", zero_division=0)
    )
    np.testing.assert_allclose(scores.precision, precision)
    np.testing.assert_allclose(scores.recall, recall)
    np.testing.assert_allclose(scores.f1, f1)
    np.testing.assert_array_equal(scores.confusion, metrics.confusion_matrix(labels, predictions, labels=classes))
    np.testing.assert_array_equal(per_class_table(scores, [str(name) for name in classes])["support"], support)
    np.testing.assert_array_equal(f1_from(scores.confusion), scores.f1)
    assert f1_macro_from(scores.confusion) == scores.f1_macro
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that are predicted and have no image
        expected = metrics.balanced_accuracy_score(labels, predictions)
    assert balanced_accuracy_from(scores.confusion) == pytest.approx(expected)
    assert accuracy_from(scores.confusion) == scores.accuracy


@given(seeds)
def test_loss_agrees_with_scikit_learn_where_not_clipped(seed: int) -> None:
    probabilities, labels = drawn(seed)
    wide = probabilities.astype(np.float64)
    wide = (wide + 1e-9) / (wide + 1e-9).sum(axis=1, keepdims=True)  # scikit-learn clips at 2e-16, we at 1e-38
    assert score(wide, labels).loss == pytest.approx(
        metrics.log_loss(labels, wide, labels=range(wide.shape[1])), rel=1e-9
    )


def test_a_class_held_impossible_costs_a_finite_loss() -> None:
    assert score(np.array([[1.0, 0.0]]), np.array([1])).loss == pytest.approx(87.34, abs=0.01)
    assert score(np.array([[1.0, 0.0]]), np.array([0])).loss == 0


@given(seeds, st.integers(1, 20))
def test_calibration_error_agrees_with_the_definition(seed: int, bins: int) -> None:
    probabilities, labels = drawn(seed)
    assert reliability(probabilities, labels, bins).ece == pytest.approx(slow_ece(probabilities, labels, bins))
    assert score(probabilities, labels).ece == pytest.approx(slow_ece(probabilities, labels, 15))


def test_a_confidence_on_an_edge_belongs_to_the_bin_below() -> None:
    edges = np.linspace(0, 1, 5)[1:]
    probabilities = np.stack([edges, 1 - edges], axis=1)[1:]  # confidence 0.5, 0.75, 1
    measured = reliability(probabilities, np.array([0, 0, 1]), bins=4)
    assert measured.count.tolist() == [0, 1, 1, 1]
    assert measured.confidence.tolist() == [0, 0.5, 0.75, 1]
    assert measured.accuracy.tolist() == [0, 1, 1, 0]


def test_ece_is_the_gap_between_confidence_and_accuracy() -> None:
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.5, 1, 200_000)
    probabilities = np.stack([sure, 1 - sure], axis=1)
    assert score(probabilities, (rng.random(len(sure)) > sure).astype(int)).ece < 0.005
    assert score(probabilities, (rng.random(len(sure)) > sure - 0.2).astype(int)).ece == pytest.approx(0.2, abs=0.005)


@given(seeds, st.booleans(), st.integers(0, 20))
def test_most_confident_are_those_that_a_full_sort_puts_first(seed: int, correct: bool, count: int) -> None:
    probabilities, labels = drawn(seed)
    rows = [i for i, row in enumerate(probabilities) if (np.argmax(row) == labels[i]) == correct]
    expected = sorted(rows, key=lambda i: -float(max(probabilities[i])))[:count]
    assert most_confident(probabilities, labels, correct, count).tolist() == expected


def test_equally_confident_images_keep_their_order() -> None:
    sure = np.tile([0.6, 0.9], 50)
    falling = [*range(1, 100, 2), *range(0, 100, 2)]
    assert most_confident(np.stack([sure, 1 - sure], axis=1), np.zeros(100, int), True, 100).tolist() == falling


def test_narrow_integers_dont_overflow() -> None:
    labels, predictions = np.array([99, 99, 3], np.uint8), np.array([98, 99, 3], np.uint8)
    confusion = confusion_matrix(labels, predictions, 100)
    assert (confusion[99, 98], confusion[99, 99], confusion[3, 3], confusion.sum()) == (1, 1, 1, 3)
    assert confusion.dtype == np.int64


@pytest.mark.parametrize(
    ("probabilities", "labels", "says"),
    [
        (np.full((3, 2), 0.5), np.array([0, 1]), "should be"),
        (np.full(3, 1.0), np.array([0, 0, 0]), "should be"),
        (np.full((2, 2), 0.5), np.array([[0], [1]]), "should be"),
        (np.zeros((0, 2)), np.zeros(0, int), "no images"),
        (np.full((2, 2), 0.6), np.array([0, 1]), "not probabilities"),
        (np.array([[0.5, 0.5], [np.nan, 1]]), np.array([0, 1]), "not probabilities"),
        (np.array([[1.5, -0.5]]), np.array([0]), "not probabilities"),
        (np.full((2, 2), 0.5), np.array([0, 2]), "outside"),
        (np.full((2, 2), 0.5), np.array([0, -1]), "outside"),
    ],
)
def test_what_cannot_be_scored_is_refused(probabilities: np.ndarray, labels: np.ndarray, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        score(probabilities, labels)


def test_half_precision_probabilities_are_scored() -> None:
    probabilities = np.random.default_rng(0).dirichlet(np.ones(100), 500).astype(np.float16)
    assert np.isfinite(score(probabilities, np.zeros(500, int)).loss)


def test_metrics_have_the_names_that_runs_log() -> None:
    scores = score(np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]]), np.array([0, 1, 1]))
    logged = scores.metrics(["cat", "dog (big)"])
    assert list(logged) == [
        *("val/loss", "val/accuracy", "val/f1_macro", "val/ece"),
        *("val/f1/cat", "val/f1/dog _big_"),
        *("val/precision/cat", "val/precision/dog _big_"),
        *("val/recall/cat", "val/recall/dog _big_"),
    ]
    assert logged["val/recall/dog _big_"] == 0.5
    assert logged["val/precision/cat"] == 0.5
    assert all(type(value) is float for value in logged.values())
    assert "test/loss" in scores.metrics(["cat", "dog"], prefix="test")


def test_metric_names_keep_valid_names_and_number_clashes() -> None:
    assert metric_names(["a/b", "a%b", "a_b", "a_b_2", "50%", "é 1.5-2:3"]) == [
        *("a_b_3", "a_b_4", "a_b", "a_b_2", "50_", "é 1.5-2:3"),
    ]


awkward = st.text(st.sampled_from("aA1_ ./-%[()$\n\té飞🐶\\"), max_size=6) | st.sampled_from(["", ".", "..", "x" * 255])


@given(st.lists(st.text(max_size=8) | awkward, unique=True, max_size=12))
def test_mlflow_accepts_the_distinct_names_of_any_classes(classes: list[str]) -> None:
    names = metric_names(classes)
    assert len(set(names)) == len(classes)
    for name in names:
        _validate_metric_name(f"val/precision/{name}")
        assert len(f"val/precision/{name}") <= 250
