"""Images whose labels are probably wrong: confident learning (Northcutt, Jiang and Chuang, JAIR 2021).

The predictions must come from models that weren't trained on the images, or they repeat the labels.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class LabelErrors:
    """K of N images, the most suspicious first."""

    indices: np.ndarray  # int64 (K,)
    suggested: np.ndarray  # int64 (K,): the class that each seems to have
    margins: np.ndarray  # float (K,): probability of the suggested class less that of the label, positive


def find_label_errors(probabilities: np.ndarray, labels: np.ndarray) -> LabelErrors:
    """Of float (N, C) and int (N,): as many as `estimate_joint` finds, those with the largest margins.

    The paper prunes each pair of classes by itself; ranking all images at once is simpler, and was not compared with
    that by measurement.
    """
    rows = np.arange(len(labels))
    joint = estimate_joint(probabilities, labels)
    others = probabilities.astype(np.float64)
    own = others[rows, labels]
    others[rows, labels] = -1.0
    margins = others.max(axis=1) - own
    order = np.argsort(-margins, kind="stable")[: round(joint.sum() - np.trace(joint))]
    order = order[margins[order] > 0]
    return LabelErrors(order, others[order].argmax(axis=1), margins[order])


def estimate_joint(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """float (C, C): how many images have this label and really are of that class, estimated; a row sums to its images.

    An image is counted in the likeliest class whose probability reaches that class's threshold, the mean probability
    that the images with its label have for it: a class that models are unsure of needs less.
    """
    num_images, num_classes = probabilities.shape
    rows = np.arange(num_images)
    counts = np.bincount(labels, minlength=num_classes)
    sums = np.bincount(labels, probabilities[rows, labels], minlength=num_classes)
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    confident = np.where(probabilities >= thresholds - 1e-6, probabilities, -1.0)  # a mean is rounded
    likeliest = confident.argmax(axis=1)
    is_counted = confident[rows, likeliest] >= 0
    joint = np.zeros((num_classes, num_classes))
    np.add.at(joint, (labels[is_counted], likeliest[is_counted]), 1)
    joint += np.diag(joint.sum(axis=1) == 0)  # of a class without a confident image: as it is labelled
    return joint / joint.sum(axis=1, keepdims=True) * counts[:, None]
