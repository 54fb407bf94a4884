"""What happens to a training image between its crop and normalisation: the recipe's operations, or those a policy draws.

The policies are torchvision's TrivialAugmentWide, RandAugment and AugMix, of bilinear sampling and black borders; but each
image draws its own operations and magnitudes. Nothing here waits for a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor

from pipeline.data.draws import Draws, beta_quantiles, log_gamma_quantiles
from pipeline.data.operations import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    adjust_sharpness,
    autocontrast,
    compose,
    equalize,
    per_image,
    perspective,
    posterize,
    rotation,
    shear_and_move,
    solarize,
    warp,
)
from pipeline.sections.augmentation import AnyAugmentation, AugMix, Custom, NoPolicy, RandAugment, TrivialAugment

# Images float32 (B, 3, S, S) in [0, 1], which it may change in place, and draws for them -> images (B, 3 * views, S, S).
Policy = Callable[[Tensor, Draws], Tensor]

_GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
_COLOUR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": adjust_brightness,
    "color": adjust_saturation,
    "contrast": adjust_contrast,
    "sharpness": adjust_sharpness,
    "posterize": posterize,
    "solarize": solarize,
    "autocontrast": lambda images, _: autocontrast(images),
    "equalize": lambda images, _: equalize(images),
}
OPERATIONS = ("identity", *_GEOMETRIC, *_COLOUR)


def policy_of(augmentation: AnyAugmentation, size: int, device: torch.device) -> Policy:
    """The policy of a recipe, for images of `size` pixels on `device`."""
    match augmentation:
        case Custom():
            return partial(_custom, augmentation, size)
        case TrivialAugment():
            return partial(_in_turn, 1, _Space(_WIDE, slice(None), size, device))
        case RandAugment(operations=count, magnitude=magnitude):
            return partial(_in_turn, count, _Space(_NARROW, slice(magnitude, magnitude + 1), size, device))
        case AugMix(severity=severity):
            own, chains = beta_quantiles(augmentation.alpha, device), log_gamma_quantiles(augmentation.alpha, device)
            mixture = partial(_mixture, augmentation, _Space(_MIXED, slice(severity), size, device), own, chains)
            return partial(_with_mixtures, mixture) if augmentation.consistency else mixture
        case NoPolicy():
            return lambda images, draw: images


def num_views(augmentation: AnyAugmentation) -> int:
    """As how many images each one is trained: with a consistency loss as itself and as two mixtures."""
    return 3 if isinstance(augmentation, AugMix) and augmentation.consistency else 1


def _custom(a: Custom, size: int, images: Tensor, draw: Draws) -> Tensor:
    """Rotation and perspective in one sampling: what the first turns out of sight can come back; then the colours.

    Always in this order, as the recipe says; torchvision's ColorJitter draws an order.
    """
    matrices = []
    if a.rotation:
        matrices.append(rotation(draw.uniform(-a.rotation, a.rotation)))
    if a.perspective:
        stop = int(a.perspective * (size // 2)) + 1
        moves = draw.integers(stop, 4, 2) * draw.chance(a.perspective_probability)[:, None, None]
        matrices.append(perspective(moves, size))
    if matrices:
        images = warp(images, reduce(compose, matrices))
    if a.brightness:
        images = adjust_brightness(images, draw.uniform(1 - a.brightness, 1 + a.brightness))
    if a.contrast:
        images = adjust_contrast(images, draw.uniform(1 - a.contrast, 1 + a.contrast))
    if a.saturation:
        images = adjust_saturation(images, draw.uniform(1 - a.saturation, 1 + a.saturation))
    if a.hue:
        images = adjust_hue(images, draw.uniform(-a.hue, a.hue))
    return images


@dataclass(frozen=True)
class _Magnitudes:
    """How strong a policy's operations are at the highest of `bins` magnitudes; at the lowest most do nothing."""

    bins: int
    shear: float  # tangent of the angle
    translation: Callable[[int], float]  # the images' size -> pixels
    rotation: float  # degrees
    colour: float  # distance from 1 of the factors of brightness, color, contrast and sharpness
    bits: tuple[int, int]  # that posterize leaves, at the lowest and at the highest
    operations: tuple[str, ...] = OPERATIONS

    def parameters(self, size: int) -> dict[str, Tensor]:
        """Operation -> its parameter at each magnitude, (bins,), and where there is one, the other way, (2, bins)."""

        def ramp(start: float, end: float) -> Tensor:
            return torch.linspace(start, end, self.bins)

        def both_ways(reach: float, centre: float = 0) -> Tensor:
            return torch.stack([centre + ramp(0, reach), centre - ramp(0, reach)])

        return {
            **dict.fromkeys(("shear_x", "shear_y"), both_ways(self.shear)),
            **dict.fromkeys(("translate_x", "translate_y"), both_ways(self.translation(size)).trunc()),
            "rotate": both_ways(self.rotation),
            **dict.fromkeys(("brightness", "color", "contrast", "sharpness"), both_ways(self.colour, centre=1)),
            "posterize": 2 ** (8 - ramp(*self.bits).round()),
            "solarize": ramp(1, 0),
        }


_NARROW = _Magnitudes(
    bins=31, shear=0.3, translation=lambda size: 150 / 331 * size, rotation=30, colour=0.9, bits=(8, 4)
)
_WIDE = _Magnitudes(
    bins=31,
    shear=0.99,
    # 32 pixels for all in torchvision's; of smaller images something stays in sight.
    translation=lambda size: 32 if size >= 32 else size - 1,
    rotation=135,
    colour=0.99,
    bits=(8, 2),
)
_MIXED = _Magnitudes(
    bins=10,
    shear=0.3,
    translation=lambda size: size / 3,
    rotation=30,
    colour=0.9,
    bits=(4, 0),
    operations=OPERATIONS[1:],
)


class _Space:
    """Operations with a parameter each, all equally likely: one draw gives operation, magnitude and direction."""

    def __init__(self, magnitudes: _Magnitudes, bins: slice, size: int, device: torch.device):
        by_name, unused = magnitudes.parameters(size), torch.zeros(())
        rows = [
            by_name.get(name, unused).broadcast_to(2, magnitudes.bins)[:, bins].flatten()
            for name in magnitudes.operations
        ]
        codes = [
            torch.full_like(row, OPERATIONS.index(name)) for name, row in zip(magnitudes.operations, rows, strict=True)
        ]
        self._parameters, self._codes = torch.cat(rows).to(device), torch.cat(codes).to(device, torch.int64)

    def draw(self, draw: Draws, *shape: int) -> tuple[Tensor, Tensor]:
        """Places in OPERATIONS, int64, and parameters, float32; both flat."""
        chosen = draw.integers(len(self._codes), *shape).view(-1)
        return self._codes.index_select(0, chosen), self._parameters.index_select(0, chosen)


def _in_turn(count: int, space: _Space, images: Tensor, draw: Draws) -> Tensor:
    for _ in range(count):
        images = operate(images, *space.draw(draw))
    return images


def _mixture(a: AugMix, space: _Space, betas: Tensor, log_gammas: Tensor, images: Tensor, draw: Draws) -> Tensor:
    """The image, and the mean of some chains of operations on it, in random proportions (arXiv 1912.02781)."""
    least, most = (1, 3) if a.depth < 0 else (a.depth, a.depth)
    depth = draw.integers(most - least + 1, a.width).view(-1) + least
    chains = images.repeat_interleave(a.width, dim=0)
    for length in range(most):
        operation, parameter = space.draw(draw, a.width)
        chains = operate(chains, operation * (depth > length), parameter)  # else the identity, which is 0
    weights = draw.of(log_gammas, a.width).softmax(1)[..., None, None, None]
    mean = chains.view(-1, a.width, *images.shape[1:]).mul_(weights).sum(1)
    return torch.lerp(mean, images, per_image(draw.of(betas)))


def _with_mixtures(mixture: Policy, images: Tensor, draw: Draws) -> Tensor:
    """Views side by side as channels, so that what is erased or mixed afterwards is the same in all of them."""
    return torch.cat([images, mixture(images, draw), mixture(images, draw)], dim=1)


def operate(images: Tensor, operation: Tensor, parameter: Tensor) -> Tensor:
    """`images` (B, 3, S, S), each after its own operation: places in OPERATIONS (B,), and that one's parameter (B,).

    May change `images` in place.
    """
    apply = _to_chosen if images.device.type == "cpu" else _to_all
    first_colour = 1 + len(_GEOMETRIC)
    places = torch.arange(1, first_colour, device=images.device)
    shear_x, shear_y, right, down, degrees = (parameter[:, None] * (operation[:, None] == places)).unbind(1)
    matrices = compose(rotation(degrees), shear_and_move(shear_x, shear_y, right, down, images.shape[-1]))
    images = apply(warp, images, (operation > 0) & (operation < first_colour), matrices)
    for place, function in enumerate(_COLOUR.values(), start=first_colour):
        images = apply(function, images, operation == place, parameter)
    return images


def _to_all(function: Callable[[Tensor, Tensor], Tensor], images: Tensor, chosen: Tensor, parameter: Tensor) -> Tensor:
    """The function's images where `chosen`, the others as they are. Computes all, but no shape depends on a value."""
    return torch.where(per_image(chosen), function(images, parameter), images)


def _to_chosen(
    function: Callable[[Tensor, Tensor], Tensor], images: Tensor, chosen: Tensor, parameter: Tensor
) -> Tensor:
    """The same, in place, of the chosen images alone: for a CPU, where counting them costs no wait."""
    rows = chosen.nonzero().view(-1)
    return images.index_copy_(0, rows, function(images.index_select(0, rows), parameter.index_select(0, rows)))
