"""What is fitted on labelled images that the network was not trained on: a temperature, and a threshold for each class.

`logits` are float (N, C), `labels` (N,) int in [0, C).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_TEMPERATURES = (0.05, 20.0)
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
    """The T in [0.05, 20] by which to divide logits (N, C), N > 0, for the least mean negative log-likelihood.

    Temperature scaling (Guo et al. 2017, arXiv 1706.04599): it corrects the confidence and leaves the predicted class.
    At a bound where the likelihood only grows towards it, as T -> 0 does for images that are all right.
    """
    from scipy.optimize import minimize_scalar

    gaps = _below_highest(logits)
    of_label = gaps[np.arange(len(labels)), labels].mean()

    def loss(log_temperature: float) -> float:
        temperature = np.exp(log_temperature)
        return float(np.log(np.exp(gaps / temperature).sum(axis=1)).mean() - of_label / temperature)

    # The loss is convex in 1 / T, so it has one minimum over log T too.
    minimum = minimize_scalar(loss, bounds=np.log(_TEMPERATURES), method="bounded")
    return float(np.exp(minimum.x).clip(*_TEMPERATURES))


def fit_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(C,) float64 thresholds t in [0.5, 2] so that argmax p / t has a high macro-F1 on probabilities (N, C), N > 0.

    One class's threshold after the other is set to the best of a grid, twice round, from 1 on, and only for a strict
    gain: a threshold stays 1 where nothing helps, and macro-F1 is never below what t = 1 has on these images.
    """
    columns = np.ascontiguousarray(probabilities.T, dtype=np.float64)
    place = np.full(len(columns), _NEAREST_TO_1[0])  # of each class's threshold on the grid
    for chosen in list(range(len(columns))) * _PASSES:
        f1 = _f1_by_threshold(columns, labels, _THRESHOLDS[place], chosen)
        best = _NEAREST_TO_1[f1[_NEAREST_TO_1].argmax()]
        if f1[best] > f1[place[chosen]] + _ROUNDING:
            place[chosen] = best
    return _THRESHOLDS[place]


def _f1_by_threshold(columns: np.ndarray, labels: np.ndarray, thresholds: np.ndarray, chosen: int) -> np.ndarray:
    """Macro-F1 of `columns` (C, N), one for each of _THRESHOLDS as the chosen class's, the other classes' fixed.

    An image goes to the chosen class below a certain threshold, else to the best of the others, its rival. Counting
    images by the grid's place of that threshold gives all confusions at once.
    """
    size, classes, grid = len(labels), len(columns), len(_THRESHOLDS)
    others = columns / thresholds[:, None]
    others[chosen] = -1
    rival, highest = others.argmax(axis=0), others.max(axis=0)
    scaled = columns[chosen] / _THRESHOLDS[:, None]
    wins = (scaled > highest) | ((scaled == highest) & (chosen < rival))  # argmax takes the first of equals
    place = wins.sum(axis=0)  # the chosen class wins at _THRESHOLDS[:place]

    def images_of_rivals(images: np.ndarray) -> np.ndarray:
        """(grid, C): how many of the images each rival has, by threshold."""
        cells = np.bincount(place[images] * classes + rival[images], minlength=(grid + 1) * classes)
        return cells.reshape(grid + 1, classes).cumsum(axis=0)[:grid]

    true = np.bincount(labels, minlength=classes)
    predicted, hits = images_of_rivals(np.arange(size)), images_of_rivals(np.flatnonzero(rival == labels))
    predicted[:, chosen] = size - predicted.sum(axis=1)
    hits[:, chosen] = wins[:, labels == chosen].sum(axis=1)
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
