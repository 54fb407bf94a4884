"""The 15 corruptions of CIFAR-10-C at its 5 strengths (Hendrycks and Dietterich 2019, arXiv 1903.12261), by our own code.

The strengths are the authors' for images of 32 pixels. Of another size, what is a length (the reach of a blur, of a
displacement) is that length by size / 32; grain and snowflakes are of a pixel at every size. Frost lays a photograph of
ice over an image there, and a random texture of such photographs' colours and contrast here.
"""

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pipeline.data.distortions import (
    brightened,
    compressed,
    convolved,
    disk_kernel,
    elastically_moved,
    filtered,
    flattened,
    fogged,
    gaussian_matrix,
    glass_blurred,
    motion_blurred,
    pixelated,
    plasma,
    rounded,
    snowed,
    truncated,
    zoomed,
)
from pipeline.data.draws import Draws

STRENGTHS = range(1, 6)
_SIZE = 32  # pixels, that the strengths are for


def corrupted(images: Tensor, kind: str, strength: int, generator: torch.Generator) -> Tensor:
    """uint8 images (B, 3, S, S) corrupted in a way of KINDS, each image by its own draws; strength 1 to 5.

    Of a generator on the CPU, the draws are the same whatever computes. An image without colours stays one.
    """
    draw = Draws(len(images), generator, images.device)
    result = _BY_KIND[kind](images.float().div_(255), strength - 1, draw)
    pixels = (truncated(result) * 255).round_().byte()
    is_grey = (images == images[:, :1]).flatten(1).all(1)[:, None, None, None]
    return torch.where(is_grey, pixels[:, :1], pixels)


def generator_of(kind: str, strength: int, seed: int) -> torch.Generator:
    """Its own for each kind and strength, on the CPU: any of them can be drawn alone."""
    digest = hashlib.sha256(f"{seed}/{kind}/{strength}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


def _gaussian_noise(images: Tensor, level: int, draw: Draws) -> Tensor:
    return images + (0.04, 0.06, 0.08, 0.09, 0.10)[level] * draw.normal(*images.shape[1:])


def _shot_noise(images: Tensor, level: int, draw: Draws) -> Tensor:
    photons = (500, 250, 100, 75, 50)[level]  # of a white pixel
    return draw.poisson(images * photons) / photons


def _impulse_noise(images: Tensor, level: int, draw: Draws) -> Tensor:
    replaced = draw.chance((0.01, 0.02, 0.03, 0.05, 0.07)[level], *images.shape[1:])
    return torch.where(replaced, draw.chance(0.5, *images.shape[1:]).float(), images)


def _defocus_blur(images: Tensor, level: int, draw: Draws) -> Tensor:
    radius, smooth = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[level]
    by_size = images.shape[-1] / _SIZE
    return convolved(images, disk_kernel(radius * by_size, smooth * by_size).to(images.device))


def _glass_blur(images: Tensor, level: int, draw: Draws) -> Tensor:
    sigma, reach, rounds = ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))[level]
    size = images.shape[-1]
    reach = max(1, round(reach * size / _SIZE))
    moves = [draw.integers(2 * reach, 2, size, size) - reach for _ in range(rounds)]
    blur = gaussian_matrix(size, sigma * size / _SIZE, 4, "nearest").to(images.device)
    return glass_blurred(images, moves, reach, blur)


def _motion_blur(images: Tensor, level: int, draw: Draws) -> Tensor:
    radius, sigma = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))[level]
    by_size = images.shape[-1] / _SIZE
    return motion_blurred(images, draw.uniform(-45, 45), radius * by_size, sigma * by_size)


def _zoom_blur(images: Tensor, level: int, draw: Draws) -> Tensor:
    most = (6, 11, 15, 20, 25)[level]  # hundredths; numpy's arange includes its end in the first two
    result = images.clone()
    for hundredths in range(most + 1):
        result += zoomed(images, 1 + hundredths / 100)
    return result / (most + 2)


def _snow(images: Tensor, level: int, draw: Draws) -> Tensor:
    mean, sd, zoom, least, radius, sigma, kept = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[level]
    size = images.shape[-1]
    layer = zoomed(mean + sd * draw.normal(1, size, size), zoom)
    layer = truncated(layer * (layer >= least))
    flakes = motion_blurred(layer, draw.uniform(-135, -45), radius * size / _SIZE, sigma * size / _SIZE)
    return snowed(images, flakes, kept)


def _frost(images: Tensor, level: int, draw: Draws) -> Tensor:
    kept, added = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[level]
    return kept * images + added * _ice(images.shape[-1], draw)


def _ice(size: int, draw: Draws) -> Tensor:
    """(B, 3, size, size): bluish, with ridges like crystals.

    Colours and contrast are those of the authors' five photographs at their scale: means from 123 to 207, a standard
    deviation of 15 levels within 32 x 32 pixels, correlated by 0.8, 0.6 and 0.3 over 1, 2 and 8 pixels.
    """
    clouds = _clouds(size, 1.5, draw)
    middle = clouds.flatten(1).median(1).values[:, None, None, None]
    ridges = -(clouds - middle).abs()
    ridges = (ridges - ridges.mean((2, 3), keepdim=True)) / ridges.std((2, 3), keepdim=True)
    light = draw.uniform(100, 228)[:, None, None, None]
    tint = torch.tensor([-18.0, 3.0, 15.0], device=clouds.device)[:, None, None]
    return (light + tint + 15 * ridges).clamp_(0, 255) / 255


def _fog(images: Tensor, level: int, draw: Draws) -> Tensor:
    strength, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[level]
    return fogged(images, _clouds(images.shape[-1], decay, draw), strength)


def _clouds(size: int, decay: float, draw: Draws) -> Tensor:
    octaves = (size - 1).bit_length()
    return plasma(size, decay, [draw.uniform(-1, 1, 3, 1 << octave, 1 << octave) for octave in range(octaves)])


def _brightness(images: Tensor, level: int, draw: Draws) -> Tensor:
    return brightened(images, (0.05, 0.1, 0.15, 0.2, 0.3)[level])


def _contrast(images: Tensor, level: int, draw: Draws) -> Tensor:
    return flattened(images, (0.75, 0.5, 0.4, 0.3, 0.15)[level])


def _elastic(images: Tensor, level: int, draw: Draws) -> Tensor:
    reach, sigma, shift = (  # shares of the size
        *((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    )[level]
    size = images.shape[-1]
    corners = draw.uniform(-shift * size, shift * size, 3, 2)
    smooth = gaussian_matrix(size, sigma * size, 3, "reflect").to(images.device)
    return elastically_moved(images, corners, reach * size * filtered(draw.uniform(-1, 1, 2, size, size), smooth))


def _pixelate(images: Tensor, level: int, draw: Draws) -> Tensor:
    return pixelated(images, int(images.shape[-1] * (0.95, 0.9, 0.85, 0.75, 0.65)[level]))


def _jpeg(images: Tensor, level: int, draw: Draws) -> Tensor:
    pixels = (rounded(images) * 255).round_().byte()
    return compressed(pixels, (80, 65, 58, 50, 40)[level]).float().div_(255)


_BY_KIND: Mapping[str, Callable[[Tensor, int, Draws], Tensor]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic": _elastic,
    "pixelate": _pixelate,
    "jpeg": _jpeg,
}
KINDS = tuple(_BY_KIND)
