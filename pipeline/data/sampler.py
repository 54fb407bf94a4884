"""Which training images an epoch shows, and in which order. Nothing here waits for the device."""

import torch
from torch import Tensor

from pipeline.sections.data import Data


def class_counts(labels: Tensor, num_classes: int) -> Tensor:
    """int64 (C,): how many of the labels (N,) are of each class. As torch.bincount, which waits for a GPU."""
    return labels.new_zeros(num_classes).index_add_(0, labels, torch.ones_like(labels))


class Sampler:
    """Orders of N training images, drawn on the device of their labels (int64, (N,))."""

    def __init__(self, labels: Tensor, num_classes: int, recipe: Data):
        self._labels = labels
        self._ends = self._ends_of(num_classes, recipe.sampler_power) if recipe.sampler == "balanced" else None

    def _ends_of(self, num_classes: int, power: float) -> Tensor:
        """float64 (N,): where each image's part of [0, N] ends, images by class; its length is how often it is expected."""
        counts = class_counts(self._labels, num_classes).double()
        shares = counts ** (1 - power) * (counts > 0)
        copies = shares / shares.sum() * len(self._labels) / counts
        return copies[self._labels.sort().values].cumsum(0)

    def epoch(self, generator: torch.Generator) -> Tensor:
        """Indices of N images, int64 (N,), in random order; `generator` is of the same device.

        Uniform: each image once. Balanced: N ticks at equal distance, from a random start, fall on the images' parts, the
        images of a class in random order (systematic sampling, Madow 1949): a class has its share to within one image,
        and no image comes more than once more often than another of its class. Drawing with replacement would leave out
        a third of the images by chance.
        """
        device, size = self._labels.device, len(self._labels)
        order = torch.randperm(size, generator=generator, device=device)
        if self._ends is None:
            return order
        by_class = order[self._labels[order].argsort(stable=True)]
        start = torch.rand((), generator=generator, device=device, dtype=torch.float64)
        ticks = torch.arange(size, device=device, dtype=torch.float64) + start
        chosen = by_class[torch.searchsorted(self._ends, ticks, right=True).clamp_(max=size - 1)]
        return chosen[torch.randperm(size, generator=generator, device=device)]
