"""Scores of a model's probabilities: loss, accuracy, per-class precision, recall and F1, calibration.

Throughout, `probabilities` is (N, C) float, each row summing to 1, and `labels` is (N,) int in [0, C). A class is
counted whether or not it occurs: where a precision, recall or F1 would divide by zero it is 0 (scikit-learn's
`zero_division=0`), and macro-F1 is the mean over all C classes of the data set.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

Objective = Literal["val/accuracy", "val/f1_macro", "val/balanced_accuracy"]  # what a study may maximise
OBJECTIVES: tuple[str, ...] = get_args(Objective)
SCORE_NAMES = {"val/accuracy": "accuracy", "val/f1_macro": "macro-F1", "val/balanced_accuracy": "balanced accuracy"}
BINS = 15  # of the calibration error: Guo et al. 2017, section 4
CLASS_F1 = "val/f1/"  # and `metric_name` of a class: its F1 on the validation split
_SMALLEST = float(np.finfo(np.float32).tiny)  # a float32 softmax underflows to 0 below it; its log is -87.3
_SUM_TOLERANCE = 1e-3  # of a row of probabilities, as float16 rounds it
_MAX_LENGTH = 200  # characters: MLflow's limit of 250 for a metric name, less what is put around the class


@dataclass(frozen=True, eq=False)
class Reliability:
    """Accuracy by confidence: one entry per bin of confidence, 0 where a bin is empty."""

    count: np.ndarray  # (bins,) int64
    confidence: np.ndarray  # (bins,) float64, mean
    accuracy: np.ndarray  # (bins,) float64

    @property
    def ece(self) -> float:
        """Expected calibration error in [0, 1] (Guo et al. 2017, arXiv 1706.04599): mean |accuracy - confidence|."""
        return float(self.count @ np.abs(self.accuracy - self.confidence) / self.count.sum())


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of a model on a split; all in [0, 1] but the loss (mean negative log-likelihood, nats)."""

    loss: float
    accuracy: float
    f1_macro: float
    ece: float
    precision: np.ndarray  # (C,) float64, like the next two
    recall: np.ndarray
    f1: np.ndarray
    confusion: np.ndarray  # (C, C) int64, rows true, columns predicted

    def metrics(self, classes: Sequence[str], prefix: str = "val") -> dict[str, float]:
        """MLflow metric name -> value: `val/loss`, `val/f1/<class>` and the others."""
        names = metric_names(classes)
        overall = {name: getattr(self, name) for name in ("loss", "accuracy", "f1_macro", "ece")}
        by_class = {
            f"{score}/{name}": float(value)
            for score in ("f1", "precision", "recall")
            for name, value in zip(names, getattr(self, score), strict=True)
        }
        return {f"{prefix}/{name}": value for name, value in (overall | by_class).items()}


def score(probabilities: np.ndarray, labels: np.ndarray) -> Scores:
    """All scores of (N, C) probabilities against (N,) labels.

    Raises ValueError on shapes that don't fit, no images, labels outside [0, C), and rows that aren't probabilities.
    """
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        raise ValueError(f"probabilities {probabilities.shape} and labels {labels.shape}: should be (N, C) and (N,)")
    if not labels.size:
        raise ValueError("no images to score")
    deviation = np.abs(probabilities.sum(axis=1, dtype=np.float64) - 1)
    if not (deviation.max() <= _SUM_TOLERANCE and probabilities.min() >= 0):  # also catches NaN
        raise ValueError(
            f"not probabilities: rows sum to 1 within {deviation.max():.3g}, smallest {probabilities.min():.3g}"
        )
    confusion = confusion_matrix(labels, probabilities.argmax(axis=1), probabilities.shape[1])
    precision, recall, f1 = _per_class(confusion)
    likelihood = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return Scores(
        loss=float(-np.log(likelihood.clip(_SMALLEST, 1)).mean()),
        accuracy=accuracy_from(confusion),
        f1_macro=float(f1.mean()),
        ece=reliability(probabilities, labels).ece,
        precision=precision,
        recall=recall,
        f1=f1,
        confusion=confusion,
    )


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """(C, C) int64 counts, rows true, columns predicted; ValueError on a class outside [0, C)."""
    pairs = np.stack([labels, predictions]).astype(np.int64, casting="same_kind")
    if pairs.size and not (pairs.min() >= 0 and pairs.max() < num_classes):
        raise ValueError(f"class {pairs.min()} or {pairs.max()} is outside the {num_classes} classes")
    cells = np.bincount(pairs[0] * num_classes + pairs[1], minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes).astype(np.int64, copy=False)


def accuracy_from(confusion: np.ndarray) -> float:
    """Share of right predictions, from (C, C) counts of at least one image."""
    return float(np.trace(confusion) / confusion.sum())


def balanced_accuracy_from(confusion: np.ndarray) -> float:
    """Mean recall over the classes that have images, from (C, C) counts of at least one image."""
    return float(_per_class(confusion)[1][confusion.sum(axis=1) > 0].mean())


def f1_from(confusion: np.ndarray) -> np.ndarray:
    """(C,) float64 F1 of each class, from (C, C) counts."""
    return _per_class(confusion)[2]


def f1_macro_from(confusion: np.ndarray) -> float:
    """Mean F1 over all C classes, from (C, C) counts."""
    return float(f1_from(confusion).mean())


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> Reliability:
    """Confidence (the highest probability) against accuracy, in equally wide bins, open below and closed above."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    correct = probabilities.argmax(axis=1) == labels
    index = np.digitize(confidence, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    counts = np.bincount(index, minlength=bins)
    return Reliability(
        count=counts,
        confidence=_ratio(np.bincount(index, confidence, bins), counts),
        accuracy=_ratio(np.bincount(index, correct, bins), counts),
    )


def most_confident(probabilities: np.ndarray, labels: np.ndarray, correct: bool, count: int) -> np.ndarray:
    """(at most count,) int64 indices of the rightly (or wrongly) predicted images, the most confident first."""
    chosen = np.flatnonzero((probabilities.argmax(axis=1) == labels) == correct)
    most_confident_first = np.argsort(-probabilities.max(axis=1)[chosen], kind="stable")
    return chosen[most_confident_first[:count]]


def per_class_table(scores: Scores, classes: Sequence[str]) -> "pd.DataFrame":
    """One row per class: class, precision, recall, f1, support (images of this class)."""
    import pandas as pd

    return pd.DataFrame(
        {
            "class": list(classes),
            "precision": scores.precision,
            "recall": scores.recall,
            "f1": scores.f1,
            "support": scores.confusion.sum(axis=1),
        }
    )


def metric_name(name: str) -> str:
    """A class as a part of an MLflow metric name, which takes few signs and only normalised paths."""
    clean = re.sub(r"[^\w.\- :]", "_", name[:_MAX_LENGTH])
    return clean if clean.strip(".") else "_" * max(len(clean), 1)


def metric_names(classes: Sequence[str]) -> list[str]:
    """`metric_name` of each class, made distinct by a number; a class that may keep its name does."""
    assert len(set(classes)) == len(classes), "the classes of a data set are distinct"
    names = {name: name for name in classes if metric_name(name) == name}
    taken = set(names)
    for name in classes:
        if name not in names:
            clean = metric_name(name)
            candidates = chain([clean], (f"{clean}_{number}" for number in count(2)))
            names[name] = next(candidate for candidate in candidates if candidate not in taken)
            taken.add(names[name])
    return [names[name] for name in classes]


def _per_class(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(C,) float64 precision, recall and F1."""
    hits, predicted, true = np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
    return _ratio(hits, predicted), _ratio(hits, true), _ratio(2 * hits, predicted + true)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Element by element, 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros(len(denominator)), where=denominator > 0)
