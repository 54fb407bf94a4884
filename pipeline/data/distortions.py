"""What corrupts images in ImageNet-C and CIFAR-10-C (Hendrycks and Dietterich 2019, arXiv 1903.12261), in batches.

Pure functions of float32 images (B, C, S, S) in [0, 1] and of what was drawn for each; results may leave [0, 1]. Each
computes what the authors' script does with one image after the other, rounded where it goes through 8 bits on its way.
Linear filters along rows and columns are matrices (S, S), which hold their treatment of the border, too.
"""

import math
from collections.abc import Sequence
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

_LUMA = (0.299, 0.587, 0.114)
_EXACT = 1e-3  # levels: a whole number that float32 made a little less than it


def truncated(images: Tensor) -> Tensor:
    """In [0, 1], at the 8-bit level below: numpy's conversion to uint8."""
    return (images * 255).clamp_(0, 255).add_(_EXACT).floor_().div_(255)


def rounded(images: Tensor) -> Tensor:
    """In [0, 1], at the nearest 8-bit level: ImageMagick's and Pillow's."""
    return (images * 255).clamp_(0, 255).add_(0.5 + _EXACT / 10).floor_().div_(255)


def filtered(images: Tensor, matrix: Tensor) -> Tensor:
    """(B, C, S, S) with `matrix` (T, S) applied to columns and rows: (B, C, T, T)."""
    return ((images @ matrix.mT).mT @ matrix.mT).mT


def gaussian_matrix(size: int, sigma: float, truncate: float, border: str) -> Tensor:
    """A blur by `sigma` pixels up to `truncate` sigmas, as scipy's `gaussian_filter` (mode `border`: nearest or reflect)."""
    reach = int(truncate * sigma + 0.5)
    taps = torch.arange(-reach, reach + 1)
    weights = (taps.double() ** 2 / (-2 * sigma**2)).exp_() if reach else torch.ones(1, dtype=torch.float64)
    source = torch.arange(size)[:, None] + taps
    if border == "nearest":
        source = source.clamp_(0, size - 1)
    else:  # d c b a | a b c d | d c b a
        source = source.remainder_(2 * size)
        source = torch.minimum(source, 2 * size - 1 - source)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, source, (weights / weights.sum()).expand(size, -1)).float()


def zoomed(images: Tensor, factor: float) -> Tensor:
    """The middle enlarged by `factor` and cut to the size: bilinear, from corner to corner, as scipy's `zoom` of order 1."""
    size = images.shape[-1]
    part = math.ceil(size / factor)
    enlarged, top = round(part * factor), (size - part) // 2
    middle = images[..., top : top + part, top : top + part]
    middle = functional.interpolate(middle, enlarged, mode="bilinear", align_corners=True)
    trim = (enlarged - size) // 2
    return middle[..., trim : trim + size, trim : trim + size]


def box_matrix(size: int, target: int) -> Tensor:
    """(target, size): resampling by Pillow's box filter, which counts a pixel whole or not at all, by its centre."""
    scale = size / target
    centres = (torch.arange(target).double() + 0.5) * scale
    distance = (torch.arange(size).double() + 0.5 - centres[:, None]) / max(scale, 1)
    inside = ((distance > -0.5) & (distance <= 0.5)).double()
    return (inside / inside.sum(1, keepdim=True)).float()


def disk_kernel(radius: float, alias_sigma: float) -> Tensor:
    """(K, K): a disk of `radius` pixels, blurred against its jagged edge."""
    reach = 1 if radius <= 8 else 2  # of the blur
    half = math.ceil(radius) + reach
    steps, taps = torch.arange(-half, half + 1).double(), torch.arange(-reach, reach + 1).double()
    disk = (steps[:, None] ** 2 + steps**2 <= radius**2).double()
    weights = (taps**2 / (-2 * alias_sigma**2)).exp_()
    smooth = weights[:, None] * weights / weights.sum() ** 2
    kernel = functional.conv2d((disk / disk.sum())[None, None], smooth[None, None], padding=reach)[0, 0]
    used = kernel.abs().sum(0).nonzero()
    return kernel[used[0] : used[-1] + 1, used[0] : used[-1] + 1].float()


def convolved(images: Tensor, kernel: Tensor) -> Tensor:
    """Every channel by one symmetric `kernel` (K, K), K odd; beyond the border c b | a b c."""
    reach, channels = len(kernel) // 2, images.shape[1]
    padded = functional.pad(images, [reach] * 4, mode="reflect")
    return functional.conv2d(padded, kernel.expand(channels, 1, -1, -1), groups=channels)


def motion_blurred(images: Tensor, degrees: Tensor, radius: float, sigma: float) -> Tensor:
    """Each image smeared from one side along its direction (B,), as ImageMagick's motion blur; the border is repeated."""
    size = images.shape[-1]
    taps = torch.arange(min(2 * math.ceil(radius) + 1, int(6 * sigma) + 2), device=images.device).double()
    weights = (taps**2 / (-2 * sigma**2)).exp()
    weights /= weights.sum()
    angle = torch.deg2rad(degrees.double())[:, None]
    steps = torch.arange(size, device=images.device)
    columns, rows = (
        (steps + (taps * way - 0.5).ceil().long()[..., None]).clamp_(0, size - 1) for way in (angle.cos(), angle.sin())
    )
    flat, result = images.flatten(2), torch.zeros_like(images).flatten(2)
    for tap, weight in enumerate(weights.tolist()):
        places = (rows[:, tap, :, None] * size + columns[:, tap, None, :]).flatten(1)
        result.add_(flat.gather(2, places[:, None].expand_as(flat)), alpha=weight)
    return rounded(result.view_as(images))


def glass_blurred(images: Tensor, moves: Sequence[Tensor], reach: int, blur: Tensor) -> Tensor:
    """Blurred, each pixel taken from near it once for each of `moves`, int64 (B, 2, S, S): down and right; blurred.

    The authors' loop is meant to swap pixels, but numpy's views make it copy them, from pixels that it reaches later:
    so each round is one lookup. The outermost pixels stay: `reach` + 1 of them at the top and left, `reach` - 1 opposite.
    """
    size = images.shape[-1]
    steps = torch.arange(size, device=images.device)
    moved = (steps > reach) & (steps <= size - reach)
    pixels = truncated(filtered(images, blur)).flatten(2)
    own = steps[:, None] * size + steps
    for move in moves:
        shift = (move[:, 0] * size + move[:, 1]) * (moved[:, None] & moved)
        pixels = pixels.gather(2, (own + shift).flatten(1)[:, None].expand_as(pixels))
    return filtered(pixels.view_as(images), blur)


def plasma(size: int, decay: float, noise: Sequence[Tensor]) -> Tensor:
    """Clouds (B, 1, size, size) in [0, 1]: the diamond-square fractal, periodic.

    noise: of octave n (B, 3, 2^n, 2^n) in [-1, 1), up to the first at which 2^(n + 1) is `size` or more. Each octave has
    `decay`^2 times less amplitude than the one before.
    """
    heights = torch.zeros_like(noise[0][:, 0])
    for octave, of_octave in enumerate(noise):
        middle, above, beside = (of_octave / decay ** (2 * octave)).unbind(1)
        corners = heights + heights.roll(-1, 1)
        centres = (corners + corners.roll(-1, 2)) / 4 + middle
        top = (centres + centres.roll(1, 1) + heights + heights.roll(-1, 2)) / 4 + above
        left = (centres + centres.roll(1, 2) + heights + heights.roll(-1, 1)) / 4 + beside
        even, odd = torch.stack([heights, top], dim=3).flatten(2), torch.stack([left, centres], dim=3).flatten(2)
        heights = torch.stack([even, odd], dim=2).flatten(1, 2)
    heights = heights - heights.amin((1, 2), keepdim=True)
    return (heights / heights.amax((1, 2), keepdim=True))[:, None, :size, :size]


def fogged(images: Tensor, clouds: Tensor, strength: float) -> Tensor:
    """Clouds (B, 1, S, S) added, and the sum made as bright as the image's brightest pixel."""
    brightest = images.amax((1, 2, 3), keepdim=True)
    return (images + strength * clouds) * (brightest / (brightest + strength))


def snowed(images: Tensor, flakes: Tensor, kept: float) -> Tensor:
    """Flakes (B, 1, S, S) and those turned by 180 degrees, over an image that is whitened but for a share `kept`."""
    luma = torch.tensor(_LUMA, device=images.device)[:, None, None] if images.shape[1] == 3 else 1
    grey = (images * luma).sum(1, keepdim=True)
    white = torch.maximum(images, grey * 1.5 + 0.5)
    return kept * images + (1 - kept) * white + flakes + flakes.flip(2, 3)


def brightened(images: Tensor, more: float) -> Tensor:
    """The value of HSV raised by `more`, up to 1: colours keep their hue and saturation, black turns grey."""
    value = images.amax(1, keepdim=True)
    raised = (value + more).clamp(max=1)
    return torch.where(value > 0, images * (raised / value.clamp_min(1e-12)), raised)


def flattened(images: Tensor, contrast: float) -> Tensor:
    """Each channel drawn towards its mean; `contrast` 1 is the image, 0 the mean."""
    mean = images.mean((2, 3), keepdim=True)
    return (images - mean) * contrast + mean


def elastically_moved(images: Tensor, corners: Tensor, field: Tensor) -> Tensor:
    """An affine map, then a field of displacements (B, 2, S, S): x and y; all in pixels.

    The map takes three corners of a square around the middle to where `corners` (B, 3, 2), x and y, moves them. Beyond
    the border the first reads c b | a b c, the second b a | a b c, as the authors' two libraries do.
    """
    size = images.shape[-1]
    middle, half = size // 2, size // 3
    square = torch.tensor([[1, 1], [1, -1], [-1, -1]], device=images.device) * half + middle
    moved = functional.pad((square + corners).double(), (0, 1), value=1)
    to_source = torch.linalg.solve(moved, square.double().expand(len(images), -1, -1))  # (B, 3, 2): (x, y, 1) -> x, y
    steps = torch.arange(size, device=images.device).double()
    points = torch.stack([*torch.meshgrid(steps, steps, indexing="xy"), torch.ones(size, size).to(steps)], dim=2)
    source = (points.view(1, -1, 3) @ to_source).view(-1, size, size, 2)
    grid = (source * (2 / (size - 1)) - 1).to(images.dtype)
    images = functional.grid_sample(images, grid, padding_mode="reflection", align_corners=True)
    source = points[..., :2] + field.permute(0, 2, 3, 1)
    grid = ((2 * source + 1) / size - 1).to(images.dtype)
    return functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def pixelated(images: Tensor, side: int) -> Tensor:
    """Made `side` pixels large and enlarged again, by box filters, each pass rounded as Pillow's."""
    size = images.shape[-1]
    for matrix in (box_matrix(size, side), box_matrix(side, size)):
        matrix = matrix.to(images.device)
        images = rounded(rounded(images @ matrix.mT).mT @ matrix.mT).mT
    return images


def compressed(images: Tensor, quality: int) -> Tensor:
    """uint8 (B, 3, S, S), each saved as JPEG by Pillow and read again; on the host."""
    result = np.empty_like(pixels := images.permute(0, 2, 3, 1).contiguous().cpu().numpy())
    for number, image in enumerate(pixels):
        file = BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        result[number] = np.asarray(Image.open(file))
    return torch.from_numpy(result).permute(0, 3, 1, 2).to(images.device)
