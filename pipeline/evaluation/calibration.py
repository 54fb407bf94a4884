"""What is fitted on labelled images that the network was not trained on: a temperature, and a threshold for each class.

`logits` are float (N, C), `labels` (N,) int in [0, C).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.processes import sign_of_life

_TEMPERATURES = (0.05, 20.0)
_PRIOR = 4.0  # its weight: alone it has log T at 0 ± 1 / sqrt(4). Of 1, 2 and 4 the best for 20 and for 50 images
_THRESHOLDS = 2 ** np.linspace(-1, 1, 17)  # 1 is among them
_NEAREST_TO_1 = np.argsort(np.abs(np.log(_THRESHOLDS)), kind="stable")
_PASSES = 2
_ROUNDING = 1e-12  # a gain of macro-F1 has to be larger


@dataclass(frozen=True)
class Calibration:
    """By what logits are divided before the softmax, and probabilities after it."""

    temperature: float
    thresholds: tuple[float, ...]  # of each class


def fit_calibration(logits: np.ndarray, labels: np.ndarray) -> Calibration:
    """Temperature and thresholds for logits (N, C); neutral ones where N is 0."""
    if not len(labels):
        return Calibration(1.0, (1.0,) * logits.shape[1])
    temperature = fit_temperature(logits, labels)
    return Calibration(temperature, tuple(fit_thresholds(softmax(logits, temperature), labels).tolist()))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T in [0.05, 20] by which to divide logits (N, C), N > 0, for the highest posterior density of 1 / T.

    Temperature scaling (Guo et al. 2017, arXiv 1706.04599): it corrects the confidence and leaves the predicted class.
    The prior of 1 / T, a gamma distribution with its mode at 1, matters where images are few: the likelihood alone grows
    as T -> 0 where all are right. Beside thousands of images it moves T by about a thousandth.
    """
    from scipy.optimize import minimize_scalar

    gaps = _below_highest(logits)
    of_label = gaps[np.arange(len(labels)), labels].mean()

    def loss(log_temperature: float) -> float:
        temperature = np.exp(log_temperature)
        mean_loss = np.log(np.exp(gaps / temperature).sum(axis=1)).mean() - of_label / temperature
        return float(mean_loss + _PRIOR / len(labels) * (1 / temperature + log_temperature))

    # Loss and prior are convex in 1 / T, so they have one minimum over log T too.
    minimum = minimize_scalar(loss, bounds=np.log(_TEMPERATURES), method="bounded")
    return float(np.exp(minimum.x).clip(*_TEMPERATURES))


def fit_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(C,) float64 thresholds t in [0.5, 2] so that argmax p / t has a high macro-F1 on probabilities (N, C), N > 0.

    One class's threshold after the other is set to the best of a grid, twice round, from 1 on, and only for a strict
    gain: a threshold stays 1 where nothing helps, and macro-F1 is never below what t = 1 has on these images.
    """
    columns = np.ascontiguousarray(probabilities.T, dtype=np.float64)
    place = np.full(len(columns), _NEAREST_TO_1[0])  # of each class's threshold on the grid
    scaled = _Scaled(columns)
    for chosen in list(range(len(columns))) * _PASSES:
        sign_of_life()
        f1 = _f1_by_threshold(columns[chosen], labels, scaled, chosen)
        best = _NEAREST_TO_1[f1[_NEAREST_TO_1].argmax()]
        if f1[best] > f1[place[chosen]] + _ROUNDING:
            place[chosen] = best
            scaled.change(chosen, columns[chosen] / _THRESHOLDS[best])
    return _THRESHOLDS[place]


class _Scaled:
    """Columns (C, N) over their classes' thresholds, with each image's best two classes, the first of equals.

    A threshold that changes moves few images' best two: with a thousand classes, to find them anew each time takes hours.
    """

    def __init__(self, columns: np.ndarray):
        self.columns = columns.copy()
        self.best, self.values = self._best_two(columns)  # (2, N) each: classes, and their numbers

    def rivals(self, chosen: int) -> tuple[np.ndarray, np.ndarray]:
        """(N,) each image's best class but the chosen one, and its number; -1 where there is only one class."""
        is_best = self.best[0] == chosen
        return np.where(is_best, self.best[1], self.best[0]), np.where(is_best, self.values[1], self.values[0])

    def change(self, chosen: int, column: np.ndarray) -> None:
        """A class has a new column (N,)."""
        self.columns[chosen] = column
        moved = np.flatnonzero((self.best == chosen).any(axis=0) | (column >= self.values[1]))
        self.best[:, moved], self.values[:, moved] = self._best_two(self.columns[:, moved])

    @staticmethod
    def _best_two(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images, first = np.arange(columns.shape[1]), columns.argmax(axis=0)
        highest = columns[first, images]
        others = columns.copy()
        others[first, images] = -1
        second = others.argmax(axis=0)
        return np.stack([first, second]), np.stack([highest, others[second, images]])


def _f1_by_threshold(column: np.ndarray, labels: np.ndarray, scaled: _Scaled, chosen: int) -> np.ndarray:
    """Macro-F1, one for each of _THRESHOLDS as the chosen class's, whose probabilities are `column` (N,).

    An image goes to the chosen class below a certain threshold, else to the best of the others, its rival. Counting
    images by the grid's place of that threshold gives all confusions at once.
    """
    size, classes, grid = len(labels), len(scaled.columns), len(_THRESHOLDS)
    rival, highest = scaled.rivals(chosen)
    place = np.zeros(size, np.int64)  # the chosen class wins at _THRESHOLDS[:place]
    near = np.flatnonzero(column / _THRESHOLDS[0] >= highest)  # else it wins at none
    tried = column[near] / _THRESHOLDS[:, None]
    place[near] = ((tried > highest[near]) | ((tried == highest[near]) & (chosen < rival[near]))).sum(axis=0)

    def images_of_rivals(images: np.ndarray) -> np.ndarray:
        """(grid, C): how many of the images each rival has, by threshold."""
        cells = np.bincount(place[images] * classes + rival[images], minlength=(grid + 1) * classes)
        return cells.reshape(grid + 1, classes).cumsum(axis=0)[:grid]

    true, is_chosen = np.bincount(labels, minlength=classes), labels == chosen
    predicted, hits = images_of_rivals(np.arange(size)), images_of_rivals(np.flatnonzero(rival == labels))
    predicted[:, chosen] = size - predicted.sum(axis=1)
    hits[:, chosen] = (place[is_chosen] > np.arange(grid)[:, None]).sum(axis=1)
    return (2 * hits / np.maximum(predicted + true, 1)).mean(axis=1)


def reweighting_line(fields: Mapping[Any, Any], probabilities: np.ndarray, labels: np.ndarray) -> str:
    """What it did to probabilities (N, C) that rare classes counted more in training; empty where they did not.

    `fields` are the recipe's by dotted name; of a run that is older than a field, it is missing or NaN.
    """
    ways = {
        "balanced sampler": fields.get("data.sampler_power", 0) if fields.get("data.sampler") == "balanced" else 0,
        "class weights": fields.get("loss.class_weights", 0),
    }
    used = [f"{way} of power {power:g}" for way, power in ways.items() if power > 0]
    if not used:
        return ""
    images = np.bincount(labels, minlength=probabilities.shape[1])
    rare = np.argsort(images, kind="stable")[: len(images) // 2]
    return (
        f"rare classes counted more in training ({', '.join(used)}): the rarer half of the classes gets "
        f"{probabilities[:, rare].sum(axis=1).mean():.1%} of the probability and has {images[rare].sum() / len(labels):.1%} "
        "of the validation images, a bias that a temperature does not remove"
    )


def _below_highest(logits: np.ndarray) -> np.ndarray:
    """Logits less their highest along the last axis, float64: float32 divided by a temperature would round to ties."""
    wide = logits.astype(np.float64)
    return wide - wide.max(axis=-1, keepdims=True)


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Of logits / temperature, along the last axis."""
    exponentials = np.exp(_below_highest(logits) / temperature)
    return exponentials / exponentials.sum(axis=-1, keepdims=True)
