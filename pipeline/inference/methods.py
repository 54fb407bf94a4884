"""Four ways from a network's logits to its probabilities, and what each is worth.

- plain: softmax of the logits, divided by a temperature.
- tta: test-time augmentation, the mean of plain's probabilities over several views of the image.
- specialised: plain's probabilities, each class divided by a threshold of its own ("threshold moving").
- adaptive: w * tta + (1 - w) * tta divided by the thresholds, where w is plain's confidence in its class.

The last two follow system 003, which made them for hard classes such as bird, cat and dog. Throughout, `logits` are
float (V, N, C), of V views of which the first is the image itself, `labels` are (N,) int in [0, C), and the predicted
class is the argmax of a row of probabilities.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from pipeline.data.augment import pad
from pipeline.evaluation.scores import score
from pipeline.evaluation.significance import f1_macro_error, mcnemar
from pipeline.recipe import Recipe

if TYPE_CHECKING:
    import pandas as pd

METHODS = ("plain", "tta", "specialised", "adaptive")
FOLDS = 5
CHANCE = 0.05  # a larger p-value is no difference
CHANCE_ERRORS = 1.96  # nor are fewer standard errors; the same level
ENOUGH = 10  # images a class, below which the standard error of macro-F1 is too small (22 % false alarms with 2)

_TEMPERATURES = (0.05, 20.0)
_THRESHOLDS = 2 ** np.linspace(-1, 1, 17)  # 1 is among them
_NEAREST_TO_1 = np.argsort(np.abs(np.log(_THRESHOLDS)), kind="stable")
_PASSES = 2
_STRICTLY = 1e-12  # more than rounding


def views_of(recipe: Recipe) -> tuple[bool, int]:
    """`flip` and `shift` of `views`: only what the network was trained to take for the same image."""
    a, size = recipe.augmentation, recipe.data.image_size
    return a.horizontal_flip != 0, min(a.crop_padding, max(1, round(size / 32)))


def views(images: Tensor, flip: bool, shift: int) -> list[Tensor]:
    """uint8 images (N, 3, S, S) as they are, mirrored (`flip`), and moved both ways by `shift` pixels (0: not moved).

    The moved ones are the image, up and to the left, and its mirror image (the image, if not `flip`), down and to the
    right; borders are mirrored. These are the six views of cifar10-airbench (Jordan 2024, arXiv 2404.00498) without
    two, as every trial pays for each.
    """
    mirrored = [images.flip(-1)] if flip else []
    if not shift:
        return [images, *mirrored]
    size = images.shape[-1]
    up_left = pad(images, shift, "reflect")[..., 2 * shift :, 2 * shift :]
    down_right = pad([images, *mirrored][-1], shift, "reflect")[..., :size, :size]
    return [images, *mirrored, up_left, down_right]


@dataclass(frozen=True)
class Fitted:
    """What the methods learn from labelled images that the network was not trained on."""

    temperature: float
    thresholds: tuple[float, ...]  # of each class


def fit(logits: np.ndarray, labels: np.ndarray) -> Fitted:
    """Temperature and thresholds for the logits (N, C) of the first view; neutral ones from no images."""
    if not len(labels):
        return Fitted(1.0, (1.0,) * logits.shape[1])
    temperature = fit_temperature(logits, labels)
    return Fitted(temperature, tuple(fit_thresholds(_softmax(logits, temperature), labels).tolist()))


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
    found = minimize_scalar(loss, bounds=np.log(_TEMPERATURES), method="bounded")
    return float(np.exp(found.x).clip(*_TEMPERATURES))


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
        if f1[best] > f1[place[chosen]] + _STRICTLY:
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

    def left_to_rivals(images: np.ndarray) -> np.ndarray:
        """(grid, C): how many of the images each rival has, by threshold."""
        cells = np.bincount(place[images] * classes + rival[images], minlength=(grid + 1) * classes)
        return cells.reshape(grid + 1, classes).cumsum(axis=0)[:grid]

    true = np.bincount(labels, minlength=classes)
    predicted, hits = left_to_rivals(np.arange(size)), left_to_rivals(np.flatnonzero(rival == labels))
    predicted[:, chosen] = size - predicted.sum(axis=1)
    hits[:, chosen] = wins[:, labels == chosen].sum(axis=1)
    return (2 * hits / np.maximum(predicted + true, 1)).mean(axis=1)


def combine(method: str, logits: np.ndarray, fitted: Fitted) -> np.ndarray:
    """The method's probabilities, (N, C) float64, from logits (V, N, C); only tta and adaptive look at V > 1 views."""
    assert method in METHODS, method
    used = logits if method in ("tta", "adaptive") else logits[:1]
    by_view = _softmax(used, fitted.temperature)
    plain, mean = by_view[0], by_view.mean(axis=0)
    if method in ("plain", "tta"):
        return mean
    specialised = mean / fitted.thresholds
    specialised /= specialised.sum(axis=1, keepdims=True)
    if method == "specialised":
        return specialised
    confidence = plain.max(axis=1, keepdims=True)
    return confidence * mean + (1 - confidence) * specialised


@dataclass(frozen=True)
class Measured:
    """A method's worth on n images, none of which it was fitted on; all in [0, 1] but the loss (nats) and the counts."""

    n: int
    accuracy: float
    f1_macro: float
    ece: float
    loss: float
    f1: tuple[float, ...]  # of each class
    right: int  # images that plain has wrong and this method right
    wrong: int  # and the other way round
    p: float  # of `right` and `wrong` by chance, McNemar's test
    f1_macro_error: float  # standard error of macro-F1 less plain's, over images

    @property
    def gain(self) -> float:
        """Accuracy less plain's."""
        return (self.right - self.wrong) / self.n

    @property
    def gain_error(self) -> float:
        """Standard error of the gain, over images; of other seeds of the training or other folds it knows nothing."""
        return float(np.sqrt((self.right + self.wrong) / self.n - self.gain**2) / np.sqrt(self.n))


def stratified_folds(labels: np.ndarray, folds: int) -> np.ndarray:
    """(N,) int64 in [0, folds), always the same: equally many images each, in all and of each class, or one more."""
    fold = np.empty(len(labels), dtype=np.int64)
    fold[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % folds
    return fold


def out_of_fold(logits: np.ndarray, labels: np.ndarray, folds: int = FOLDS) -> dict[str, np.ndarray]:
    """Each method's probabilities (N, C) on logits (V, N, C), N > 0, each fold's by what was fitted on the others.

    Fitted and judged on the same images, thresholds would look better than they are.
    """
    fold = stratified_folds(labels, folds)
    probabilities = {method: np.empty(logits.shape[1:]) for method in METHODS}
    for held_out in np.unique(fold):
        inside = fold == held_out
        fitted = fit(logits[0, ~inside], labels[~inside])
        for method in METHODS:
            probabilities[method][inside] = combine(method, logits[:, inside], fitted)
    return probabilities


def measure(probabilities: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, Measured]:
    """Each method's worth by its `out_of_fold` probabilities; plain's loss and ECE are those after scaling."""
    plain = probabilities["plain"].argmax(axis=1)
    return {method: _measured(probabilities[method], labels, plain) for method in METHODS}


def _measured(probabilities: np.ndarray, labels: np.ndarray, plain: np.ndarray) -> Measured:
    """`plain` (N,): the classes that plain predicts."""
    scores, predictions = score(probabilities, labels), probabilities.argmax(axis=1)
    right = int(((predictions == labels) & (plain != labels)).sum())
    wrong = int(((predictions != labels) & (plain == labels)).sum())
    return Measured(
        n=len(labels),
        accuracy=scores.accuracy,
        f1_macro=scores.f1_macro,
        ece=scores.ece,
        loss=scores.loss,
        f1=tuple(scores.f1.tolist()),
        right=right,
        wrong=wrong,
        p=mcnemar(right, wrong),
        f1_macro_error=f1_macro_error(labels, plain, predictions, probabilities.shape[1]),
    )


def methods_table(measured: Mapping[str, Measured], classes: Sequence[str]) -> "pd.DataFrame":
    """Accuracy and macro-F1 of "all", then the F1 of each class: a column for each method, then each less plain.

    Columns: class, score, plain, tta, ..., tta - plain, ...; all in [0, 1], to four digits.
    """
    import pandas as pd

    rows = {method: [m.accuracy, m.f1_macro, *m.f1] for method, m in measured.items()}
    values = pd.DataFrame(rows)
    for method in measured:
        if method != "plain":
            values[f"{method} - plain"] = values[method] - values["plain"]
    names = {"class": ["all", "all", *classes], "score": ["accuracy", "macro-F1", *["F1"] * len(classes)]}
    return pd.concat([pd.DataFrame(names), values.round(4)], axis=1)


def verdict(measured: Mapping[str, Measured], method: str, classes: Sequence[str]) -> str:
    """What the method is worth against plain, in a sentence; `measured` has both. After ± are standard errors.

    Classes are named only where accuracy or macro-F1 differ beyond chance: the largest of many small changes always
    looks like something.
    """
    plain, its = measured["plain"], measured[method]
    split = f"{method} on the {its.n:,} validation image{'s' * (its.n != 1)}"
    if method == "plain":
        return f"{split}: accuracy {its.accuracy:.2%}, macro-F1 {its.f1_macro:.2%}."
    f1_gain = its.f1_macro - plain.f1_macro
    p = "p < 0.001" if its.p < 0.001 else f"p = {its.p:.3f}"
    parts = [
        f"accuracy {100 * its.gain:+.2f} ± {100 * its.gain_error:.2f} points ({its.right:,} put right, "
        f"{its.wrong:,} put wrong, {p}), macro-F1 {_points(f1_gain):+.1f} ± {_points(its.f1_macro_error):.1f}"
    ]
    f1_differs = its.n >= ENOUGH * len(classes) and abs(f1_gain) > CHANCE_ERRORS * its.f1_macro_error
    if its.p > CHANCE and not f1_differs:
        return f"{split}: no difference beyond chance; {parts[0]}."
    gains = [_points(mine - plains) for mine, plains in zip(its.f1, plain.f1, strict=True)]
    if max(gains) > 0:
        parts.append(f"most gained: {classes[gains.index(max(gains))]} {max(gains):+.1f}")
    if min(gains) < 0:
        parts.append(f"most lost: {classes[gains.index(min(gains))]} {min(gains):+.1f}")
    return f"{split}: {'; '.join(parts)}."


def f1_changes(measured: Mapping[str, Measured], method: str, classes: Sequence[str]) -> str:
    """What every class's F1 is by the method less plain's, in points."""
    pairs = zip(classes, measured[method].f1, measured["plain"].f1, strict=True)
    return "F1 by class: " + ", ".join(f"{name} {_points(its - plains):+.1f}" for name, its, plains in pairs)


def _points(difference: float) -> float:
    """In hundredths, to one digit, without a minus before 0."""
    return round(100 * difference, 1) + 0.0


def _below_highest(logits: np.ndarray) -> np.ndarray:
    """Logits less their highest along the last axis, float64: float32 divided by a temperature would round to ties."""
    wide = logits.astype(np.float64)
    return wide - wide.max(axis=-1, keepdims=True)


def _softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Of logits / temperature, along the last axis."""
    exponentials = np.exp(_below_highest(logits) / temperature)
    return exponentials / exponentials.sum(axis=-1, keepdims=True)
