"""From a network and images to logits."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from pipeline.data.augment import normalise
from pipeline.data.mapped import MappedImages
from pipeline.processes import sign_of_life

MOST_TOGETHER, PIXELS_TOGETHER = 500, 500 * 64**2


@functools.cache
def bf16_supported(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 itself: emulated, as on older CPUs, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags: list[Callable[[], bool]] = [
        getattr(torch.cpu, name, lambda: False) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    ]
    return any(flag() for flag in flags)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a network runs at a recipe's `training.precision`; `auto` is bf16 where it is fast."""
    bf16 = precision == "bf16" or (precision == "auto" and bf16_supported(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Convolutions in float32 itself: a GPU rounds their inputs to 10 bits otherwise."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def images_together(image_size: int) -> int:
    """How many images of S x S pixels are predicted at once: of photos, 500 take gigabytes in a network's first layers."""
    return max(1, min(MOST_TOGETHER, PIXELS_TOGETHER // image_size**2))


@torch.inference_mode()
def predict_logits(
    network: nn.Module,
    images: Tensor | MappedImages,
    mean: Tensor,
    std: Tensor,
    precision: str,
    batch_size: int | None = None,
) -> Tensor:
    """uint8 images (N, 3, S, S) -> float32 logits (N, num_classes) on the same device, in evaluation mode.

    `batch_size` defaults to `images_together`. Leaves the network in the mode that it was in. Does not synchronise with
    the device.
    """
    was_training = network.training
    network.eval()
    logits = []
    for chunk in images.split(batch_size or images_together(images.shape[-1])):
        sign_of_life()
        x = normalise(chunk, mean, std)  # in channels_last, as the network is
        with autocast(images.device, precision):
            logits.append(network(x).float())
    network.train(was_training)
    return torch.cat(logits)
