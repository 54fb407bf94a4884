"""Four methods from a network's logits to probabilities, and the scores of each.

- plain: softmax of the logits, divided by a temperature.
- tta: test-time augmentation, the mean of plain's probabilities over several views of the image.
- specialised: plain's probabilities, each class divided by a threshold of its own ("threshold moving").
- adaptive: w * tta + (1 - w) * tta divided by the thresholds, where w is plain's confidence in its class.

The last two are of `attention`'s project (studies/README.md), made for hard classes such as bird, cat and dog. Throughout,
`logits` are float (V, N, C), of V views of which the first is the image itself, `labels` are (N,) int in [0, C), and the
predicted class is the argmax of a row of probabilities.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from pipeline.data.augment import pad
from pipeline.evaluation.calibration import Calibration, fit_calibration, softmax
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


def combine(method: str, logits: np.ndarray, calibration: Calibration) -> np.ndarray:
    """The method's probabilities, (N, C) float64, from logits (V, N, C); only tta and adaptive use V > 1 views."""
    assert method in METHODS, method
    used = logits if method in ("tta", "adaptive") else logits[:1]
    by_view = softmax(used, calibration.temperature)
    plain, mean = by_view[0], by_view.mean(axis=0)
    if method in ("plain", "tta"):
        return mean
    specialised = mean / calibration.thresholds
    specialised /= specialised.sum(axis=1, keepdims=True)
    if method == "specialised":
        return specialised
    confidence = plain.max(axis=1, keepdims=True)
    return confidence * mean + (1 - confidence) * specialised


@dataclass(frozen=True)
class MethodScores:
    """Of a method on n images, none of which it was fitted on; all in [0, 1] but the loss (nats) and the counts."""

    n: int
    accuracy: float
    f1_macro: float
    ece: float
    loss: float
    f1: tuple[float, ...]  # of each class
    gained: int  # images that plain has wrong and this method right
    lost: int  # images that plain has right and this method wrong
    p: float  # of `gained` and `lost` by chance, McNemar's test
    f1_macro_error: float  # standard error of macro-F1 less plain's, over images

    @property
    def gain(self) -> float:
        """Accuracy less plain's."""
        return (self.gained - self.lost) / self.n

    @property
    def gain_error(self) -> float:
        """Standard error of the gain, over images; of other seeds of the training or other folds it knows nothing."""
        return float(np.sqrt((self.gained + self.lost) / self.n - self.gain**2) / np.sqrt(self.n))


def stratified_folds(labels: np.ndarray, folds: int) -> np.ndarray:
    """(N,) int64 in [0, folds), always the same: equally many images each, in all and of each class, or one more."""
    fold = np.empty(len(labels), dtype=np.int64)
    fold[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % folds
    return fold


def out_of_fold(logits: np.ndarray, labels: np.ndarray, folds: int = FOLDS) -> dict[str, np.ndarray]:
    """Each method's probabilities (N, C) on logits (V, N, C), N > 0, each fold's by what was fitted on the others.

    Fitted and measured on the same images, thresholds would look better than they are.
    """
    fold = stratified_folds(labels, folds)
    probabilities = {method: np.empty(logits.shape[1:]) for method in METHODS}
    for held_out in np.unique(fold):
        inside = fold == held_out
        calibration = fit_calibration(logits[0, ~inside], labels[~inside])
        for method in METHODS:
            probabilities[method][inside] = combine(method, logits[:, inside], calibration)
    return probabilities


def measure(probabilities: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, MethodScores]:
    """Each method's scores by its `out_of_fold` probabilities; plain's loss and ECE are those after scaling."""
    plain = probabilities["plain"].argmax(axis=1)
    return {method: _measured(probabilities[method], labels, plain) for method in METHODS}


def _measured(probabilities: np.ndarray, labels: np.ndarray, plain: np.ndarray) -> MethodScores:
    """`plain` (N,): the classes that plain predicts."""
    scores, predictions = score(probabilities, labels), probabilities.argmax(axis=1)
    gained = int(((predictions == labels) & (plain != labels)).sum())
    lost = int(((predictions != labels) & (plain == labels)).sum())
    return MethodScores(
        n=len(labels),
        accuracy=scores.accuracy,
        f1_macro=scores.f1_macro,
        ece=scores.ece,
        loss=scores.loss,
        f1=tuple(scores.f1.tolist()),
        gained=gained,
        lost=lost,
        p=mcnemar(gained, lost),
        f1_macro_error=f1_macro_error(labels, plain, predictions, probabilities.shape[1]),
    )


def methods_table(measured: Mapping[str, MethodScores], classes: Sequence[str]) -> "pd.DataFrame":
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


def compare_with_plain(measured: Mapping[str, MethodScores], method: str, classes: Sequence[str]) -> str:
    """The method's scores against plain's, in a sentence; `measured` has both. After ± are standard errors.

    Classes are named only where accuracy or macro-F1 differ beyond chance: the largest of many small changes always
    looks like something.
    """
    plain, scores = measured["plain"], measured[method]
    split = f"{method} on the {scores.n:,} validation image{'s' * (scores.n != 1)}"
    f1_gain = scores.f1_macro - plain.f1_macro
    p = "p < 0.001" if scores.p < 0.001 else f"p = {scores.p:.3f}"
    parts = [
        f"accuracy {100 * scores.gain:+.2f} ± {100 * scores.gain_error:.2f} points ({scores.gained:,} put right, "
        f"{scores.lost:,} put wrong, {p}), macro-F1 {_points(f1_gain):+.1f} ± {_points(scores.f1_macro_error):.1f}"
    ]
    f1_differs = scores.n >= ENOUGH * len(classes) and abs(f1_gain) > CHANCE_ERRORS * scores.f1_macro_error
    if scores.p > CHANCE and not f1_differs:
        return f"{split}: no difference beyond chance; {parts[0]}."
    gains = [_points(of_method - of_plain) for of_method, of_plain in zip(scores.f1, plain.f1, strict=True)]
    if max(gains) > 0:
        parts.append(f"most gained: {classes[gains.index(max(gains))]} {max(gains):+.1f}")
    if min(gains) < 0:
        parts.append(f"most lost: {classes[gains.index(min(gains))]} {min(gains):+.1f}")
    return f"{split}: {'; '.join(parts)}."


def f1_changes(measured: Mapping[str, MethodScores], method: str, classes: Sequence[str]) -> str:
    """F1 by the method less F1 by plain of every class, in points."""
    pairs = zip(classes, measured[method].f1, measured["plain"].f1, strict=True)
    return "F1 by class: " + ", ".join(
        f"{name} {_points(of_method - of_plain):+.1f}" for name, of_method, of_plain in pairs
    )


def _points(difference: float) -> float:
    """In hundredths, to one digit, without a minus before 0."""
    return round(100 * difference, 1) + 0.0
