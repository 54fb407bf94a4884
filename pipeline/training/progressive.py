"""Curriculum: images that begin small and little augmented, and grow, as pure functions of the epoch.

Progressive image size and regularisation, after EfficientNetV2 (Tan and Le 2021, arXiv 2104.00298).
"""

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.recipe import Recipe
from pipeline.sections.curriculum import Curriculum

STAGES = 8  # a full size's worth of them: 32 pixels grow by 4, 224 by 28; each other size is compiled or captured anew


def image_size(recipe: Recipe, epoch: int) -> int:
    """Height and width in pixels of the images that the network trains on in `epoch`, from 1."""
    full, start = recipe.data.image_size, recipe.curriculum.start_size
    if not start:
        return full
    step = max(full // STAGES, 1)
    progress = _progress(recipe.curriculum, epoch, recipe.training.epochs)
    return full if progress == 1 else start + step * math.floor((full - start) * progress / step + 1e-9)


def smaller_sizes(full: int, start: int) -> Sequence[int]:
    """Those that images have, in a training of any length, before they have the full one; none where `start` is 0."""
    return range(start, full, max(full // STAGES, 1)) if start else ()


def mean_size(recipe: Recipe) -> int:
    """Of the sizes that images may have the nearest to a training's mean in pixels: one at it takes about as long."""
    full, epochs = recipe.data.image_size, range(1, recipe.training.epochs + 1)
    mean = sum(image_size(recipe, epoch) ** 2 for epoch in epochs) / len(epochs)
    sizes = [*smaller_sizes(full, recipe.curriculum.start_size), full]
    return min(sizes, key=lambda size: abs(size**2 - mean))


def strength(recipe: Recipe, epoch: int) -> float | None:
    """Share of the images that augmentation changes in `epoch`, from 1; None where it is all of them throughout."""
    start = recipe.curriculum.start_strength
    if start == 1:
        return None
    return start + (1 - start) * _progress(recipe.curriculum, epoch, recipe.training.epochs)


def at_size(images: Tensor, size: int) -> Tensor:
    """float (B, 3, S, S), scaled to `size` x `size` pixels: bilinear, averaging where it shrinks, as torchvision's resize."""
    if images.shape[-1] == size:
        return images
    return interpolate(images, (size, size), mode="bilinear", antialias=True)


def _progress(curriculum: Curriculum, epoch: int, epochs: int) -> float:
    """From 0 in the first epoch to 1 at the share `until` of all, in the last epoch in any case."""
    rise = min(curriculum.until * epochs, epochs - 1)
    return 1.0 if epoch - 1 >= rise else (epoch - 1) / rise
