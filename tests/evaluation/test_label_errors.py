"""Planted wrong labels are found."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from pipeline.evaluation.label_errors import estimate_joint, find_label_errors


def test_planted_wrong_labels_of_digits_are_found() -> None:
    digits, random = load_digits(), np.random.default_rng(0)
    labels = digits.target.copy()
    wrong = random.choice(len(labels), 36, replace=False)  # 2 %
    labels[wrong] = (labels[wrong] + random.integers(1, 10, 36)) % 10
    probabilities = cross_val_predict(KNeighborsClassifier(15), digits.data, labels, cv=5, method="predict_proba")
    found = find_label_errors(probabilities, labels)
    is_hit = np.isin(found.indices, wrong)
    assert is_hit.sum() >= 33, "recall 0.92"
    assert is_hit.mean() >= 0.7
    assert is_hit[:20].all(), "the most suspicious first"
    assert (found.suggested[is_hit] == digits.target[found.indices[is_hit]]).all()
    assert (np.diff(found.margins) <= 0).all() and (found.margins > 0).all()


def test_joint_counts_by_each_class_own_threshold() -> None:
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.45, 0.55], [0.5, 0.5], [0.4, 0.6], [0.95, 0.05]])
    labels = np.array([0, 0, 0, 1, 1, 1])
    # Thresholds: 0.75 and 0.383; no. 2 and 3 are counted as 1, no. 5 as 0.
    assert estimate_joint(probabilities, labels) == pytest.approx(np.array([[2, 1], [1, 2]]))
    assert find_label_errors(probabilities, labels).indices.tolist() == [5, 2]


def test_class_without_images_or_confidence_is_no_error() -> None:
    probabilities = np.array([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.9, 0.05, 0.05]])
    joint = estimate_joint(probabilities, np.array([0, 1, 0]))
    assert joint.sum(axis=1).tolist() == [2, 1, 0]
    assert not len(find_label_errors(np.full((4, 2), 0.5), np.array([0, 1, 0, 1])).indices)
