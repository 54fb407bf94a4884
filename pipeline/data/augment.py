"""Augmentation of batches on the images' device, with random parameters drawn for each image.

One pure function per operation takes explicit parameters per image; `Augmenter` draws them and applies the operations
in the order of `recipe.Augmentation`. Nothing here waits for the device: no tensor's value reaches Python, and no
constant is copied from the host while training. Images are square; colours are in [0, 1] unless they are uint8.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from pipeline.recipe import Augmentation

ERASED_AREA = (0.02, 0.33)  # share of the image, uniform
ERASED_RATIO = (0.3, 3.3)  # height by width, log-uniform
CROP_RATIO, CROP_TRIES = (3 / 4, 4 / 3), 10  # of random_resized_crop: width by height, log-uniform
ERASING_TRIES = 10  # a rectangle must be smaller than the image in both directions

_LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, rounded as torchvision rounds it
_BETA_QUANTILES = 4096
_OUTSIDE = 3.0  # a coordinate where bilinear sampling of [-1, 1] finds nothing, at any size


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 (colour / 255 - mean) / std in channels_last; `mean` and `std` are (3,)."""
    return _standardise(_unit(images), mean, std).contiguous(memory_format=torch.channels_last)


def pad(images: Tensor, padding: int, mode: str) -> Tensor:
    """uint8 (N, 3, S, S) with `padding` more pixels on each side: a mirror image ("reflect", less than S) or black."""
    padded = functional.pad(images, [padding] * 4)
    if mode == "reflect":  # torch's own knows no uint8; to copy the borders alone takes a quarter of an index_select
        for dim in (2, 3):
            end = padded.shape[dim] - padding
            for border, source in ((0, padding + 1), (end, end - 1 - padding)):
                padded.narrow(dim, border, padding).copy_(padded.narrow(dim, source, padding).flip(dim))
    return padded


def crop(padded: Tensor, indices: Tensor, top: Tensor, left: Tensor, flip: Tensor, size: int) -> Tensor:
    """Of the images `indices` in `padded` (N, 3, S, S), windows of `size` x `size` pixels, mirrored where `flip`.

    indices, top, left: int64 (B,), the last two in pixels; flip: bool (B,). Returns (B, 3, size, size).
    """
    side = padded.shape[-1]
    steps = torch.arange(size, device=padded.device)
    columns = torch.where(flip[:, None], size - 1 - steps, steps) + left[:, None]
    planes = indices[:, None] * 3 + steps[:3]
    rows = planes[:, :, None] * side + (top[:, None] + steps)[:, None]
    pixels = rows[..., None] * side + columns[:, None, None]
    # index_select on the flat tensor is 3x faster on a CPU than take, 10x faster than indexing.
    return padded.view(-1).index_select(0, pixels.view(-1)).view(pixels.shape)


def part(images: Tensor, y: Tensor, x: Tensor, height: Tensor, width: Tensor, size: int) -> Tensor:
    """Rectangles of `images` (B, 3, L, L), resampled bilinearly to (B, 3, size, size); all others are (B,).

    The image covers [-1, 1] in both directions: y, x are the centres there, height and width are shares of the image's;
    a negative width mirrors. Nothing is averaged: a rectangle should have at most twice as many pixels a side as `size`.
    """
    steps = (torch.arange(size, device=images.device) * 2 + 1) / size - 1
    rows, columns = (centre[:, None] + share[:, None] * steps for centre, share in ((y, height), (x, width)))
    grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), dim=3)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def rotation(degrees: Tensor) -> Tensor:
    """Matrices (B, 3, 3) for `warp` that turn what is seen anticlockwise about the centre, by `degrees` (B,)."""
    angle = torch.deg2rad(degrees)
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    return torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], dim=1).view(-1, 3, 3)


def perspective(moves: Tensor, size: int) -> Tensor:
    """Matrices (B, 3, 3) for `warp` that move the corners of what is seen inwards by `moves` (B, 4, 2): x, y in pixels.

    The corners are top left, top right, bottom right and bottom left, at 0 and size - 1 as in torchvision's
    `perspective`. The homography from a quadrilateral to a square (Heckbert 1989) is written in cross products, which
    join two points to a line and meet two lines in a point, so there is no linear system to solve. Where three corners
    lie on one line there is none, and the matrix need not be finite; `warp` takes it all the same.
    """
    corner = torch.arange(4, device=moves.device)
    far = torch.stack([(corner == 1) | (corner == 2), corner >= 2], dim=1).float()  # (4, 2): is x, y at size - 1?
    width = 2 * (size - 1) / size  # from corner to corner, in the coordinates of `warp`, the first corner being at -1
    corners = far * width - 1 + moves * (1 - 2 * far) * (2 / size)
    points = torch.cat([corners, torch.ones_like(corners[..., :1])], dim=2)
    edges = torch.linalg.cross(points, points.roll(-1, dims=1))  # top, right, bottom, left
    vanishing = torch.linalg.cross(edges[:, :2], edges[:, 2:])  # where opposite edges meet
    horizon = torch.linalg.cross(vanishing[:, :1], vanishing[:, 1:])
    # x is 0 on the left edge and 1 at the top right corner; y is 0 on the top edge and 1 at the bottom left corner.
    zero, one = edges.roll(1, dims=1)[:, :2], points[:, 1::2]
    unit = zero * ((horizon * one).sum(2, keepdim=True) / (zero * one).sum(2, keepdim=True))
    return torch.cat([unit * width - horizon, horizon], dim=1)


def compose(first: Tensor, second: Tensor) -> Tensor:
    """Matrices (B, 3, 3) for `warp` that do in one sampling what `first` and then `second` do."""
    return (first[..., None] * second[:, None]).sum(2)  # no matmul: autocast or TF32 would round it to few bits


def warp(images: Tensor, matrix: Tensor) -> Tensor:
    """`images` (B, 3, S, S) seen through homographies (B, 3, 3), sampled bilinearly, black where nothing is seen.

    A matrix takes a point (x, y, 1) of the result to its source; the image covers [-1, 1] in both directions. As in
    torchvision's `rotate` and `perspective` with fill=None, the border blends into the black.
    """
    size = images.shape[-1]
    centres = (torch.arange(size, device=images.device) * 2 + 1) / size - 1
    x_part = matrix[..., 0, None] * centres + matrix[..., 2, None]
    y_part = matrix[..., 1, None] * centres
    sources = x_part[..., None, :] + y_part[..., None]  # (B, 3, S, S)
    grid = (sources[:, :2] / sources[:, 2:]).nan_to_num_(nan=_OUTSIDE).clamp_(-_OUTSIDE, _OUTSIDE)
    return functional.grid_sample(images, grid.permute(0, 2, 3, 1), padding_mode="zeros", align_corners=False)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """`images` (B, 3, S, S) blended with black: `factor` (B,) 0 is black, 1 the image; as in torchvision."""
    return (images * _per_image(factor)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """`images` (B, 3, S, S) blended with their mean grey: `factor` (B,) 0 is grey, 1 the image; as in torchvision."""
    factor, mean = _per_image(factor), _per_image(_grey(images.mean((2, 3))))
    return (images * factor).add_(mean * (1 - factor)).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """`images` (B, 3, S, S) blended with their grey images: `factor` (B,) 0 is grey, 1 the image; as in torchvision."""
    factor = _per_image(factor)
    return (images * factor).add_(_grey(images)[:, None].mul_(1 - factor)).clamp_(0, 1)


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """`images` (B, 3, S, S) with the hue of HSV shifted by `turns` (B,) of the colour wheel; equals torchvision's.

    Value and saturation stay, so each channel is low + chroma * wave(hue), and HSV need not be computed in full.
    """
    red, green, blue = images.unbind(1)
    high, low = images.amax(1), images.amin(1)
    chroma = high - low
    # torch.lerp by 0 or 1 chooses as torch.where does, 4x faster on a CPU.
    is_red, is_green = (red == high).float(), (green == high).float()
    sixths = torch.lerp((red - green).add_(chroma, alpha=4), (blue - red).add_(chroma, alpha=2), is_green)
    sixths = torch.lerp(sixths, green - blue, is_red).div_(chroma.clamp_min(1e-12))  # the hue, in [-1, 5]
    # A channel's wave, by sixths of a turn from its own hue, has period 6: 1 up to 1, down to 0 at 2, up from 4 to 5.
    offset = -2 * torch.arange(3, device=images.device)  # -2 and -4: 4 and 2 sixths, for green and blue
    offset = (6 * turns[:, None] + offset + 5).remainder_(6).sub_(5)  # so that the sum below stays in [-6, 6]
    wave = (sixths[:, None] + offset[..., None, None]).abs_().sub_(3).abs_().sub_(1).clamp_(0, 1)
    return torch.addcmul(low[:, None], chroma[:, None], wave)


def rectangle(top: Tensor, left: Tensor, height: Tensor, width: Tensor, size: int) -> Tensor:
    """float32 (B, 1, size, size): 1 inside the rectangles, 0 outside. All in pixels, (B,); what lies outside is cut."""
    steps = torch.arange(size, device=top.device)
    rows = (steps >= top[:, None]) & (steps < (top + height)[:, None])
    columns = (steps >= left[:, None]) & (steps < (left + width)[:, None])
    return (rows[:, None, :, None] & columns[:, None, None]).float()


def erase(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """`images` (B, 3, S, S) with 0 in a rectangle each, in pixels, (B,) (random erasing, arXiv 1708.04896)."""
    return images * (1 - rectangle(top, left, height, width, images.shape[-1]))


def cutmix_share(kept: Tensor, centre_y: Tensor, centre_x: Tensor, size: int) -> Tensor:
    """Shares (B, 1, size, size) for `mix`: 0 in a square around the centre, the partner's part (arXiv 1905.04899).

    All are (B,): `kept` is the area that the image keeps, in [0, 1], before the square is cut at the image's border.
    """
    half = ((1 - kept).sqrt() * size).floor().div(2, rounding_mode="floor")
    return 1 - rectangle(centre_y - half, centre_x - half, 2 * half, 2 * half, size)


def mix(images: Tensor, targets: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Each image blended with the one before it in the batch, the first with the last (mixup, arXiv 1710.09412).

    images (B, 3, S, S); targets (B, classes); share (B, 1, S, S): the image's own part of each pixel, in [0, 1]. The
    targets are blended by the shares' means, so in CutMix by the area really pasted.
    """
    own = share.mean((2, 3)).view(-1, 1)
    return torch.lerp(images.roll(1, dims=0), images, share), torch.lerp(targets.roll(1, dims=0), targets, own)


# Images -> how and in which version they were padded, and the result, while the images live. The result is read only.
_PADDED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _padded_once(images: Tensor, padding: int, mode: str) -> Tensor:
    """`pad`, contiguous; cached for the process's next training on these images, padded in this way."""
    form = padding, mode, images._version
    if form != _PADDED.get(images, (None,))[0]:
        _PADDED.pop(images, None)  # before the next one is made: both together would take twice the memory
        _PADDED[images] = form, pad(images, padding, mode).contiguous()
    padded: Tensor = _PADDED[images][1]
    return padded


@dataclass(frozen=True, eq=False)
class RandomCrop:
    """Random parts of images that are held larger, squashed: of which size, and from which share of the area on."""

    size: int  # pixels
    scale: float
    aspects: Tensor  # float32 (N,), width by height before they were squashed


class Augmenter:
    """Training batches of one data set, augmented at random at each call.

    Holds the padded images on their device: N * 3 * (S + 2 * crop_padding)^2 bytes, shared with the next training's.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        num_classes: int,
        mean: Tensor,
        std: Tensor,
        augmentation: Augmentation,
        seed: int = 0,
        cut: RandomCrop | None = None,
    ):
        """images uint8 (N, 3, S, S); labels int64 (N,); mean and std float32 (3,), colours in [0, 1]; on one device.

        With `cut`, random parts of the images, which are larger than the batches, take the place of padding and crop.
        `seed` draws which images an alternating flip mirrors in odd epochs; the others are mirrored in even ones.
        """
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        assert images.shape[2] == images.shape[3]
        assert labels.shape == images.shape[:1]
        self._augmentation, self._cut = augmentation, cut
        self._size = cut.size if cut else images.shape[-1]
        self._padded = _padded_once(images, 0 if cut else augmentation.crop_padding, augmentation.crop_mode)
        self._labels, self._num_classes = labels, num_classes
        self._mean, self._std = mean, std
        coins = torch.rand(len(images), generator=torch.Generator().manual_seed(seed)) < 0.5
        self._mirrored_when_odd = coins.to(images.device)
        self._mirrored = self._mirrored_when_odd.clone()
        self._mixup_quantiles = _beta_quantiles(augmentation.mixup_alpha, images.device)
        self._cutmix_quantiles = _beta_quantiles(augmentation.cutmix_alpha, images.device)

    def start_epoch(self, epoch: int) -> None:
        """The next batches belong to `epoch`, from 1; only an alternating flip depends on it."""
        self._mirrored.copy_(self._mirrored_when_odd ^ (epoch % 2 == 0))  # in place: a captured batch reads it there

    def batch(
        self, indices: Tensor, generator: torch.Generator, on_part: Callable[[str], None] = lambda part: None
    ) -> tuple[Tensor, Tensor]:
        """The images `indices` (B,), int64 on the device, with random numbers from `generator` (of the same device).

        Returns images float32 (B, 3, S, S), normalised, in channels_last, and targets float32 (B, num_classes), rows
        summing to 1. Calls `on_part("augmentation")` when the pixels are gathered (`training.loop.PARTS`).
        """
        draw = _Draws(len(indices), generator)
        images = self._randomly_resized(indices, self._cut, draw) if self._cut else _unit(self._cropped(indices, draw))
        on_part("augmentation")
        images = self._warped(images, draw)
        images = _standardise(self._jittered(images, draw), self._mean, self._std)
        labels = self._labels.index_select(0, indices)
        targets = images.new_zeros(len(indices), self._num_classes).scatter_(1, labels[:, None], 1.0)
        images, targets = self._mixed(self._erased(images, draw), targets, draw)
        return images.contiguous(memory_format=torch.channels_last), targets

    def _flip(self, indices: Tensor, draw: "_Draws") -> Tensor:
        chance = self._augmentation.horizontal_flip
        # Alternating (Jordan 2024, arXiv 2404.00498): two epochs show both sides of an image, where chance repeats half.
        return self._mirrored.index_select(0, indices) if isinstance(chance, str) else draw.chance(chance)

    def _cropped(self, indices: Tensor, draw: "_Draws") -> Tensor:
        offsets, flip = 2 * self._augmentation.crop_padding + 1, self._flip(indices, draw)
        return crop(self._padded, indices, draw.integers(offsets), draw.integers(offsets), flip, self._size)

    def _randomly_resized(self, indices: Tensor, cut: RandomCrop, draw: "_Draws") -> Tensor:
        """Parts of the images as torchvision's RandomResizedCrop draws them, (B, 3, S, S), colours in [0, 1]."""
        flip = self._flip(indices, draw)
        height, width = _part_shares(draw, cut.aspects.index_select(0, indices), cut.scale)
        y, x = ((1 - share) * (2 * draw.unit() - 1) for share in (height, width))
        images = _unit(self._padded.index_select(0, indices))
        return part(images, y, x, height, torch.where(flip, -width, width), cut.size)

    def _warped(self, images: Tensor, draw: "_Draws") -> Tensor:
        """Rotation, then perspective, in one sampling; what the rotation turns out of sight can so come back."""
        a = self._augmentation
        matrices = []
        if a.rotation:
            matrices.append(rotation(draw.uniform(-a.rotation, a.rotation)))
        if a.perspective:
            stop = int(a.perspective * (self._size // 2)) + 1
            moves = draw.integers(stop, 4, 2) * draw.chance(a.perspective_probability)[:, None, None]
            matrices.append(perspective(moves, self._size))
        return warp(images, reduce(compose, matrices)) if matrices else images

    def _jittered(self, images: Tensor, draw: "_Draws") -> Tensor:
        """Always in this order, as the recipe says; torchvision's ColorJitter draws an order."""
        a = self._augmentation
        if a.brightness:
            images = adjust_brightness(images, draw.uniform(1 - a.brightness, 1 + a.brightness))
        if a.contrast:
            images = adjust_contrast(images, draw.uniform(1 - a.contrast, 1 + a.contrast))
        if a.saturation:
            images = adjust_saturation(images, draw.uniform(1 - a.saturation, 1 + a.saturation))
        if a.hue:
            images = adjust_hue(images, draw.uniform(-a.hue, a.hue))
        return images

    def _erased(self, images: Tensor, draw: "_Draws") -> Tensor:
        if not self._augmentation.erasing:
            return images
        height, width = _erased_sizes(draw, self._size)
        height = height * draw.chance(self._augmentation.erasing)
        top, left = draw.below(self._size + 1 - height), draw.below(self._size + 1 - width)
        return erase(images, top, left, height, width)

    def _mixed(self, images: Tensor, targets: Tensor, draw: "_Draws") -> tuple[Tensor, Tensor]:
        a, size = self._augmentation, self._size
        if not a.mixup and not a.cutmix:
            return images, targets
        share = images.new_ones(len(images), 1, size, size)
        choice = _per_image(draw.unit())
        if a.mixup:
            share = torch.where(choice < a.mixup, _per_image(draw.of(self._mixup_quantiles)), share)
        if a.cutmix:
            kept = draw.of(self._cutmix_quantiles)
            pasted = cutmix_share(kept, draw.integers(size), draw.integers(size), size)
            share = torch.where((choice >= a.mixup) & (choice < a.mixup + a.cutmix), pasted, share)
        return mix(images, targets, share)


class _Draws:
    """Random numbers for `count` images, each (count,) or (count, *shape), on the generator's device."""

    def __init__(self, count: int, generator: torch.Generator):
        self._count, self._generator = count, generator

    def unit(self, *shape: int) -> Tensor:
        """In [0, 1); without the two kernels that `uniform` takes to get there."""
        return torch.rand(self._count, *shape, generator=self._generator, device=self._generator.device)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return self.unit(*shape).mul_(high - low).add_(low)

    def integers(self, stop: int, *shape: int) -> Tensor:
        return torch.randint(stop, (self._count, *shape), generator=self._generator, device=self._generator.device)

    def below(self, stop: Tensor) -> Tensor:
        """Whole numbers in [0, stop), as float32; `stop` (count,) is whole and has its own value for each image."""
        return (self.unit() * stop).floor_()

    def chance(self, probability: float) -> Tensor:
        return self.unit() < probability

    def of(self, values: Tensor) -> Tensor:
        return values.index_select(0, self.integers(len(values)))


def _part_shares(draw: _Draws, aspects: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Height and width (B,), as shares of images of these aspects, as torchvision's RandomResizedCrop draws them."""
    area = draw.uniform(scale, 1.0, CROP_TRIES) * aspects[:, None]
    ratio = draw.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1]), CROP_TRIES).exp_()
    height, width = (area / ratio).sqrt_(), (area * ratio).sqrt_() / aspects[:, None]
    # Of equals, argmax takes the first; where no try fits, the first is cut at the image's border.
    first = ((height <= 1) & (width <= 1)).int().argmax(1, keepdim=True)
    return height.gather(1, first).view(-1).clamp_(max=1), width.gather(1, first).view(-1).clamp_(max=1)


def _erased_sizes(draw: _Draws, size: int) -> tuple[Tensor, Tensor]:
    """Height and width (B,), float32, in pixels, as torchvision's RandomErasing draws them."""
    area = draw.uniform(*ERASED_AREA, ERASING_TRIES) * size**2
    ratio = draw.uniform(math.log(ERASED_RATIO[0]), math.log(ERASED_RATIO[1]), ERASING_TRIES).exp_()
    height, width = (area * ratio).sqrt_().round_(), (area / ratio).sqrt_().round_()
    # Of equals, argmax takes the first. A try fails at a rate below 2 %, so ten at less than 1e-17.
    first = ((height < size) & (width < size)).int().argmax(1, keepdim=True)
    return height.gather(1, first).view(-1), width.gather(1, first).view(-1)


def _beta_quantiles(alpha: float, device: torch.device) -> Tensor:
    """Beta(alpha, alpha) as a table of equally likely values; torch's own sampler takes no generator."""
    from scipy.special import betaincinv  # scipy.stats.beta.ppf without the import of scipy.stats, which takes 0.4 s

    probabilities = (torch.arange(_BETA_QUANTILES, dtype=torch.float64) + 0.5) / _BETA_QUANTILES
    return torch.from_numpy(betaincinv(alpha, alpha, probabilities.numpy())).to(device, torch.float32)


def _unit(images: Tensor) -> Tensor:
    return images.float().div_(255)


def _standardise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return (images - mean[:, None, None]).div_(std[:, None, None])


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _grey(images: Tensor) -> Tensor:
    """(B, 3, ...) -> (B, ...)"""
    red, green, blue = images.unbind(1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])
