"""Is a difference more than chance? Methods are compared on the same images, so what counts is where they disagree."""

import numpy as np


def mcnemar(better: int, worse: int) -> float:
    """Two-sided p-value that two methods are equally often right (McNemar 1947, the exact binomial form).

    `better` and `worse` count the images that only one of the two has right. 1.0 where both are 0.
    """
    from scipy.special import bdtr  # the binomial distribution without the import of scipy.stats, which takes 0.4 s

    return min(1.0, 2 * float(bdtr(min(better, worse), better + worse, 0.5)))


def f1_macro_error(labels: np.ndarray, first: np.ndarray, second: np.ndarray, num_classes: int) -> float:
    """Standard error, over images, of the difference in macro-F1 between two predictions (N,) (delta method)."""
    moves = _f1_moves(labels, second, num_classes) - _f1_moves(labels, first, num_classes)
    return float(np.sqrt((moves**2).sum()))


def _f1_moves(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """(N,) float64: how far each image moves the macro-F1, to first order; they sum to 0."""
    correct = labels == predictions
    hits = np.bincount(labels[correct], minlength=num_classes)
    both = np.bincount(labels, minlength=num_classes) + np.bincount(predictions, minlength=num_classes)
    share = 1 / np.maximum(both, 1)  # of an image in its class; F1 is 2 * hits * share
    f1_share = 2 * hits * share**2
    return (2 * correct * share[labels] - f1_share[labels] - f1_share[predictions]) / num_classes
