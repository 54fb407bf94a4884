"""How many images a model still recognises when they are corrupted: 15 kinds at 5 strengths, see `data/corruptions.py`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from io import StringIO

import numpy as np
import torch
from torch import Tensor

from pipeline.data.corruptions import KINDS, STRENGTHS, corrupted, generator_of
from pipeline.data.mapped import MappedImages
from pipeline.evaluation.logits import images_together

SEED = 0  # of the corruptions: all models meet the same images
PREFIX = "robustness/"  # of the metrics


@dataclass(frozen=True, eq=False)
class Robustness:
    """Accuracies on one split, in [0, 1]."""

    num_images: int
    clean: float
    accuracy: np.ndarray  # (15, 5): of each of KINDS, at each of STRENGTHS

    @cached_property
    def by_kind(self) -> np.ndarray:
        """(15,), the mean over strengths."""
        means: np.ndarray = self.accuracy.mean(axis=1)
        return means

    @property
    def mean(self) -> float:
        """Over all kinds and strengths; 1 less it is the mean corruption error, not normalised, as usual on CIFAR-10-C."""
        return float(self.accuracy.mean())

    def metrics(self) -> dict[str, float]:
        """By MLflow name."""
        by_kind = {f"{PREFIX}{kind}": float(mean) for kind, mean in zip(KINDS, self.by_kind, strict=True)}
        return {f"{PREFIX}mean": self.mean, **by_kind}

    def to_csv(self) -> str:
        """Columns kind, strength, accuracy, images; the first row is of the images as they are: `clean`, strength 0."""
        import pandas as pd

        rows = [("clean", 0, self.clean)]
        rows += [(kind, s, self.accuracy[k, s - 1]) for k, kind in enumerate(KINDS) for s in STRENGTHS]
        frame = pd.DataFrame(rows, columns=["kind", "strength", "accuracy"])
        return frame.assign(images=self.num_images).to_csv(index=False)

    @classmethod
    def from_csv(cls, text: str) -> "Robustness":
        """What `to_csv` wrote; ValueError where it is anything else."""
        import pandas as pd

        frame = pd.read_csv(StringIO(text))
        expected = [("clean", 0), *((kind, s) for kind in KINDS for s in STRENGTHS)]
        is_ours = list(frame.columns) == ["kind", "strength", "accuracy", "images"] and not frame.isna().any(axis=None)
        if not is_ours or list(zip(frame["kind"], frame["strength"], strict=True)) != expected:
            raise ValueError("not a table of accuracies by kind and strength")
        accuracy = frame["accuracy"].to_numpy(float)
        return cls(int(frame["images"].iloc[0]), float(accuracy[0]), accuracy[1:].reshape(len(KINDS), len(STRENGTHS)))


def measure_robustness(
    predict: Callable[[Tensor], Tensor],
    images: Tensor | MappedImages,
    labels: Tensor,
    device: torch.device,
    on_part: Callable[[int, int], None] = lambda done, parts: None,
) -> Robustness:
    """Of uint8 images (N, 3, S, S) with labels (N,). `predict`: such images on `device` -> classes (B,) there.

    `on_part(done, parts)` is called after each of the 76 passes over the images.
    """
    together, parts = images_together(images.shape[-1]), len(KINDS) * len(STRENGTHS) + 1

    def accuracy(change: Callable[[Tensor], Tensor]) -> float:
        right = 0
        for chunk, true in zip(images.split(together), labels.split(together), strict=True):
            right += int((predict(change(chunk.to(device))) == true.to(device)).sum())
        return right / len(labels)

    clean = accuracy(lambda chunk: chunk)
    on_part(1, parts)
    found = np.empty((len(KINDS), len(STRENGTHS)))
    for k, kind in enumerate(KINDS):
        for s, strength in enumerate(STRENGTHS):
            generator = generator_of(kind, strength, SEED)
            found[k, s] = accuracy(partial(corrupted, kind=kind, strength=strength, generator=generator))
            on_part(2 + k * len(STRENGTHS) + s, parts)
    return Robustness(len(labels), clean, found)
