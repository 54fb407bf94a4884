"""Images, batches of them, and what they are compared with, for the tests of augmentation."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from pipeline.data.augment import Augmenter
from pipeline.sections.augmentation import AnyAugmentation

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.25])
OFF: dict[str, Any] = {"crop_padding": 0, "horizontal_flip": 0.0}
sizes = pytest.mark.parametrize("size", [16, 32])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(count: int, size: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator(seed))


def smooth_images(count: int, size: int) -> Tensor:
    """float32 in [0.1, 0.9], without detail that a second bilinear sampling would blur."""
    coarse = random_images(count, 4).float() / 255 * 0.8 + 0.1
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0.1, 0.9)


def augmenter(images: Tensor, mean: Tensor = MEAN, std: Tensor = STD, **changes: Any) -> Augmenter:
    augmentation: Any = TypeAdapter(AnyAugmentation).validate_python(OFF | changes)
    return Augmenter(images, torch.arange(len(images)) % 10, 10, mean, std, augmentation)


def colours(images: Tensor, count: int | None = None, seed: int = 0, **changes: Any) -> Tensor:
    """A batch in [0, 1], not standardised: of all the images, or `count` times the first."""
    made = augmenter(images, torch.zeros(3), torch.ones(3), **changes)
    indices = torch.arange(len(images)) if count is None else torch.zeros(count, dtype=torch.int64)
    return made.batch(indices, generator(seed))[0]


def one_by_one(operation: Any, images: Tensor, parameters: Tensor) -> Tensor:
    """torchvision takes one parameter for a whole batch."""
    return torch.stack([operation(image, value.item()) for image, value in zip(images, parameters, strict=True)])


def corners_after(moves: Tensor, size: int) -> list[list[int]]:
    (a, b), (c, d), (e, f), (g, h) = moves.tolist()
    far = size - 1
    return [[a, b], [far - c, d], [far - e, far - f], [g, far - h]]


def torchvision_perspective(image: Tensor, moves: Tensor) -> Tensor:
    size = image.shape[-1]
    start = corners_after(torch.zeros(4, 2, dtype=torch.int64), size)
    return reference.perspective(image, start, corners_after(moves, size), v2.InterpolationMode.BILINEAR)


def assert_same_distribution(sample: Tensor, other: Tensor) -> None:
    assert stats.ks_2samp(sample.numpy(), other.numpy()).pvalue > 0.01


class NoSynchronisation(TorchDispatchMode):
    """Refuses what makes a host wait for a GPU: reading values, shapes that depend on values, constants copied over."""

    BANNED = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "equal", "is_nonzero", "solve", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        assert not any(name == banned or name.endswith(f"_{banned}") for banned in self.BANNED), name
        if name in ("index", "index_put", "index_put_"):
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), name
        return func(*args, **(kwargs or {}))
