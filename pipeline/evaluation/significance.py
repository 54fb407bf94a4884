"""Whether a difference is more than chance. Methods are compared on the same images, so only those count where they differ.

Trainings that differ by their seed are a sample: means of them have an interval, and recipes are compared seed by seed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count as count_from

import numpy as np

from pipeline.evaluation.scores import confusion_matrix, f1_macro_from

LEVEL = 0.95  # of intervals
MAX_WIDTH = 0.2  # of the interval of an accuracy; where it is wider, a caution says that the images are too few


@dataclass(frozen=True)
class Sample:
    """Mean, standard deviation and 95 % interval of the mean (Student's t) of n numbers; None where n is too small."""

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None


def sample(values: Sequence[float], least_sd: float = 0.0, overlap: float = 0.0) -> Sample:
    """Of at least one number. The interval is that of a standard deviation of `least_sd` where theirs is smaller.

    `overlap` is added to the 1 / n of the mean's variance where the numbers depend on each other: for K folds, 1 / (K - 1),
    validation by training images, `fold_overlap` (Nadeau and Bengio, Machine Learning 52, 2003).
    """
    from scipy.special import stdtrit  # Student's t without the import of scipy.stats

    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Sample(n, mean, None, None, None)
    sd = float(np.std(values, ddof=1))
    half = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * max(sd, least_sd) * math.sqrt(1 / n + overlap)
    return Sample(n, mean, sd, mean - half, mean + half)


def image_step(objective: str, labels: np.ndarray, num_classes: int) -> float:
    """The most by which one validation image moves a score: an image of the smallest class among the labels (N,).

    Exact for accuracy and balanced accuracy, an approximation for macro-F1.
    """
    counts = np.unique(labels, return_counts=True)[1]
    steps = {
        "val/balanced_accuracy": 1 / (len(counts) * counts.min()),
        "val/f1_macro": 2 / (num_classes * (counts.min() + 1)),
    }
    return float(steps.get(objective, 1 / len(labels)))


def fold_overlap(folds: int) -> float:
    """The `overlap` of `sample` and `paired_t` for scores on so many folds; 0 folds are none: all on one split."""
    return 1 / (folds - 1) if folds else 0.0


def paired_t(differences: Sequence[float], least_sd: float, overlap: float = 0.0) -> float:
    """Two-sided p-value that the mean of paired differences is 0 (Student's t, n - 1 degrees of freedom); 1 for n < 2.

    `least_sd`, in their units and above 0, stands for their standard deviation where that is smaller: scores come in
    steps of an image, so a few equal differences are no proof of a certain one. `overlap` is that of `sample`.
    """
    from scipy.special import stdtr

    n = len(differences)
    if n < 2:
        return 1.0
    t = (
        abs(float(np.mean(differences)))
        / max(float(np.std(differences, ddof=1)), least_sd)
        / math.sqrt(1 / n + overlap)
    )
    return 2 * float(stdtr(n - 1, -t))


def wilson(right: float, images: int) -> tuple[float, float]:
    """The 95 % interval, in [0, 1], of an accuracy of `right` images, or a half more, among `images` (Wilson 1927)."""
    from scipy.special import ndtri

    z, share = float(ndtri((1 + LEVEL) / 2)), right / images
    middle = (share + z**2 / (2 * images)) / (1 + z**2 / images)
    half = z * math.sqrt(share * (1 - share) / images + z**2 / (4 * images**2)) / (1 + z**2 / images)
    return max(0.0, middle - half), min(1.0, middle + half)


def small_split_line(images: int, fraction: float | None) -> str | None:
    """A caution about a validation split whose scores are too uncertain, with how many images suffice; else None.

    Too small: the interval of an accuracy of 50 %, the widest that there is, is wider than MAX_WIDTH. `fraction` is the
    recipe's validation_fraction, None where that drew no split.
    """

    def is_wide(count: int) -> bool:
        low, high = wilson(count / 2, count)
        return high - low > MAX_WIDTH

    if not is_wide(images):
        return None
    needed = next(count for count in count_from(images + 1) if not is_wide(count))
    low, high = wilson(images / 2, images)
    return (
        f"caution: {images} validation images say little: an accuracy of 50 % among them has a 95 % interval from "
        f"{100 * low:.0f} to {100 * high:.0f} % (Wilson); {needed} narrow it to {100 * MAX_WIDTH:.0f} points"
    ) + (
        f", at data.validation_fraction = {fraction:g} that takes {math.ceil(needed / fraction):,} images in all"
        if fraction
        else ""
    )


def mcnemar(better: int, worse: int) -> float:
    """Two-sided p-value that two methods are equally often right (McNemar 1947, the exact binomial form).

    `better` and `worse` count the images that only one of the two has right. 1.0 where both are 0.
    """
    from scipy.special import bdtr  # the binomial distribution without the import of scipy.stats, which takes 0.4 s

    return min(1.0, 2 * float(bdtr(min(better, worse), better + worse, 0.5)))


def mcnemar_one_sided(gained: int, lost: int) -> float:
    """p-value that the challenger is right at most as often as the champion, the exact binomial form; 1 without any."""
    from scipy.special import bdtrc

    return float(bdtrc(gained - 1, gained + lost, 0.5)) if gained else 1.0


def paired_difference(
    objective: str, labels: np.ndarray, first: np.ndarray, second: np.ndarray, num_classes: int
) -> tuple[float, float]:
    """An objective's score of the predictions `first` (N,) less that of `second`, and its standard error over images.

    Of macro-F1 by the delta method; of balanced accuracy as if each class had been drawn with its number of images.
    """
    if objective == "val/f1_macro":
        one, two = (f1_macro_from(confusion_matrix(labels, answers, num_classes)) for answers in (first, second))
        return one - two, f1_macro_error(labels, second, first, num_classes)
    gains = (labels == first).astype(float) - (labels == second)
    strata = (
        [gains[labels == label] for label in np.unique(labels)] if objective == "val/balanced_accuracy" else [gains]
    )
    error = math.sqrt(sum(of.var() / len(of) for of in strata)) / len(strata)
    return float(np.mean([of.mean() for of in strata])), error


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
