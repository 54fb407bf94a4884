"""Permutation tests and draws of images, on predictions whose truth is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.metrics import f1_score, recall_score

from pipeline.evaluation.resampling import image_counts, scores_from, swap_errors, swap_test
from pipeline.evaluation.significance import mcnemar_one_sided


@given(seed=st.integers(0, 1000), share=st.floats(0.3, 0.7))
@settings(max_examples=10)
def test_swapped_answers_give_mcnemars_p_value_of_accuracy(seed: int, share: float) -> None:
    random = np.random.default_rng(seed)
    labels, moved = random.integers(4, size=300), random.random(300)
    new, old = (
        np.where(wrong, (labels + random.integers(1, 4, size=300)) % 4, labels) for wrong in disagreeing(moved, share)
    )
    gained, lost = int(((new == labels) & (old != labels)).sum()), int(((new != labels) & (old == labels)).sum())
    assert swap_test("val/accuracy", labels, new, old, 4) == pytest.approx(mcnemar_one_sided(gained, lost), abs=0.02)


def disagreeing(draw: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the new model is wrong, and the old: a tenth each of all images, `share` of them the old one's alone."""
    return (draw < 0.05) | ((draw > 0.8) & (draw > 0.8 + 0.2 * share)), (draw < 0.05) | (
        (draw > 0.8) & (draw <= 0.8 + 0.2 * share)
    )


@pytest.mark.parametrize("objective", ["val/balanced_accuracy", "val/f1_macro"])
def test_equally_good_models_of_rare_classes_rarely_differ(objective: str) -> None:
    random, found = np.random.default_rng(0), 0
    labels = np.repeat([0, 1, 2], [360, 30, 10])
    for _ in range(200):
        new, old = (np.where(random.random(400) < 0.7, labels, random.integers(3, size=400)) for _ in range(2))
        found += swap_test(objective, labels, new, old, 3, swaps=400) <= 0.05
    assert 2 <= found <= binom.ppf(0.99, 200, 0.05)


def test_equal_predictions_never_differ() -> None:
    labels = np.arange(20) % 2
    assert swap_test("val/f1_macro", labels, labels, labels, 2) == 1
    assert not swap_errors(labels, labels, labels, 2)["f1"].any()


def test_error_of_a_class_that_lost_all_its_images_is_that_of_coins() -> None:
    """Its recall is a sum of so many coins: the bootstrap would say 0."""
    labels = np.repeat([0, 1], [4, 400])
    errors = swap_errors(labels, np.ones(404, int), labels, 2)["recall"]
    assert errors == pytest.approx([np.sqrt(4) / 4, 0], rel=0.1)


def test_scores_of_sums_are_those_of_the_images() -> None:
    random = np.random.default_rng(0)
    labels, answers = random.integers(4, size=(2, 300))
    found = scores_from(image_counts(labels, answers, 4).sum(axis=0, dtype=np.float64)[None], 4)
    assert found["f1"][0] == pytest.approx(f1_score(labels, answers, average=None))
    assert found["recall"][0] == pytest.approx(recall_score(labels, answers, average=None))
    assert found["val/f1_macro"][0, 0] == pytest.approx(f1_score(labels, answers, average="macro"))
    assert found["val/accuracy"][0, 0] == pytest.approx((labels == answers).mean())
