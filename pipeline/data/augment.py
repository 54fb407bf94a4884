"""Augmentation of batches on the images' device, with random parameters drawn for each image.

One pure function per operation takes explicit parameters per image; `Augmenter` draws them: crop and flip, then the
recipe's policy (`policies.py`), then erasing and mixing. Nothing here waits for the device: no tensor's value reaches
Python, and no constant is copied from the host while training. Images are square; colours are in [0, 1] unless they are
uint8.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from pipeline.data.draws import Draws, beta_quantiles
from pipeline.data.mapped import MappedImages
from pipeline.data.operations import per_image
from pipeline.data.policies import num_views, policy_of
from pipeline.sections.augmentation import AnyAugmentation

ERASED_AREA = (0.02, 0.33)  # share of the image, uniform
ERASED_RATIO = (0.3, 3.3)  # height by width, log-uniform
CROP_RATIO, CROP_TRIES = (3 / 4, 4 / 3), 10  # of random_resized_crop: width by height, log-uniform
ERASING_TRIES = 10  # a rectangle must be smaller than the image in both directions


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
    """`pad`, contiguous; cached for the process's next training on these images, padded in this way.

    Without padding the images themselves, of which a copy would take as much memory again.
    """
    if not padding:
        _PADDED.pop(images, None)
        return images.contiguous()
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

    Holds padded images on their device: N * 3 * (S + 2 * crop_padding)^2 bytes, shared with the next training's. Of
    images in a file it holds one batch, and the same comes of it, bit for bit.
    """

    def __init__(
        self,
        images: Tensor | MappedImages,
        labels: Tensor,
        num_classes: int,
        mean: Tensor,
        std: Tensor,
        augmentation: AnyAugmentation,
        seed: int = 0,
        cut: RandomCrop | None = None,
    ):
        """images uint8 (N, 3, S, S); labels int64 (N,); mean and std float32 (3,), colours in [0, 1]; on one device.

        With `cut`, random parts of the images, which are larger than the batches, take the place of padding and crop.
        `seed` draws which images an alternating flip mirrors in odd epochs; the others are mirrored in even ones.
        """
        assert images.shape[1] == 3
        assert images.shape[2] == images.shape[3]
        assert labels.shape == images.shape[:1]
        self._augmentation, self._cut = augmentation, cut
        self._size = cut.size if cut else images.shape[-1]
        self._padding = (0 if cut else augmentation.crop_padding), augmentation.crop_mode
        self._padded = None if isinstance(images, MappedImages) else _padded_once(images, *self._padding)
        self._loaded: Tensor | None = None
        self._labels, self._num_classes = labels, num_classes
        self._views = num_views(augmentation)
        self._mean, self._std = mean.repeat(self._views), std.repeat(self._views)
        coins = torch.rand(len(images), generator=torch.Generator().manual_seed(seed)) < 0.5
        self._mirrored_when_odd = coins.to(images.device)
        self._mirrored = self._mirrored_when_odd.clone()
        self._policy = policy_of(augmentation, self._size, images.device)
        self._strength: Tensor | None = None
        self._mixup_quantiles = beta_quantiles(augmentation.mixup_alpha, images.device)
        self._cutmix_quantiles = beta_quantiles(augmentation.cutmix_alpha, images.device)

    def start_epoch(self, epoch: int, strength: float | None = None) -> None:
        """The next batches belong to `epoch`, from 1, which alternating flips depend on.

        `strength`: in [0, 1], the share of the images that get what policy, erasing and mixing do; None: all.
        """
        self._mirrored.copy_(self._mirrored_when_odd ^ (epoch % 2 == 0))  # in place: a captured batch reads it there
        if strength is not None:
            self._strength = torch.zeros((), device=self._mirrored.device) if self._strength is None else self._strength
            self._strength.fill_(strength)

    def load(self, images: Tensor) -> None:
        """The next batch's images (B, 3, S, S), on the device, in the order of its indices: for images in a file."""
        if self._loaded is None:
            self._loaded = torch.empty_like(images)
        self._loaded.copy_(images)  # in place: a captured batch reads them there

    def batch(
        self, indices: Tensor, generator: torch.Generator, on_part: Callable[[str], None] = lambda part: None
    ) -> tuple[Tensor, Tensor]:
        """The images `indices` (B,), int64 on the device, with random numbers from `generator` (of the same device).

        Returns images float32 (B, 3, S, S), normalised, in channels_last, and targets float32 (B, num_classes), rows
        summing to 1. Of several views (`policies.num_views`) there are (views * B) images: first all as they are.
        Calls `on_part("augmentation")` when the pixels are gathered (`training.loop.PARTS`).
        """
        draw = Draws(len(indices), generator)
        pixels = self._randomly_resized(indices, self._cut, draw) if self._cut else self._cropped(indices, draw)
        on_part("augmentation")
        images = _standardise(self._changed(_unit(pixels), draw), self._mean, self._std)
        labels = self._labels.index_select(0, indices)
        targets = images.new_zeros(len(indices), self._num_classes).scatter_(1, labels[:, None], 1.0)
        images, targets = self._mixed(self._erased(images, draw), targets, draw)
        images = images.unflatten(1, (self._views, 3)).transpose(0, 1).flatten(0, 1)
        return images.contiguous(memory_format=torch.channels_last), targets

    def _changed(self, images: Tensor, draw: Draws) -> Tensor:
        """What the policy makes of the images, or of some of them."""
        if self._strength is None:
            return self._policy(images, draw)
        chosen = per_image(draw.chance(self._strength))
        return torch.where(chosen, self._policy(images.clone(), draw), images.repeat(1, self._views, 1, 1))

    def _chance(self, probability: float) -> float | Tensor:
        return probability if self._strength is None else probability * self._strength

    def _source(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Padded images, and which of them are the batch's, int64 (B,)."""
        if self._padded is not None:
            return self._padded, indices
        assert self._loaded is not None, "nothing was loaded"
        return pad(self._loaded, *self._padding), torch.arange(len(indices), device=indices.device)

    def _flip(self, indices: Tensor, draw: Draws) -> Tensor:
        chance = self._augmentation.horizontal_flip
        # Alternating (Jordan 2024, arXiv 2404.00498): two epochs show both sides of an image, where chance repeats half.
        return self._mirrored.index_select(0, indices) if isinstance(chance, str) else draw.chance(chance)

    def _randomly_resized(self, indices: Tensor, cut: RandomCrop, draw: Draws) -> Tensor:
        """Parts of the images as torchvision's RandomResizedCrop draws them, (B, 3, S, S); colours up to 255."""
        flip = self._flip(indices, draw)
        height, width = _part_shares(draw, cut.aspects.index_select(0, indices), cut.scale)
        y, x = ((1 - share) * (2 * draw.unit() - 1) for share in (height, width))
        padded, numbers = self._source(indices)
        images = padded.index_select(0, numbers).float()
        return part(images, y, x, height, torch.where(flip, -width, width), cut.size)

    def _cropped(self, indices: Tensor, draw: Draws) -> Tensor:
        offsets, flip = 2 * self._augmentation.crop_padding + 1, self._flip(indices, draw)
        return crop(*self._source(indices), draw.integers(offsets), draw.integers(offsets), flip, self._size)

    def _erased(self, images: Tensor, draw: Draws) -> Tensor:
        if not self._augmentation.erasing:
            return images
        height, width = _erased_sizes(draw, self._size)
        height = height * draw.chance(self._chance(self._augmentation.erasing))
        top, left = draw.below(self._size + 1 - height), draw.below(self._size + 1 - width)
        return erase(images, top, left, height, width)

    def _mixed(self, images: Tensor, targets: Tensor, draw: Draws) -> tuple[Tensor, Tensor]:
        a, size = self._augmentation, self._size
        if not a.mixup and not a.cutmix:
            return images, targets
        share = images.new_ones(len(images), 1, size, size)
        choice, mixup, both = per_image(draw.unit()), self._chance(a.mixup), self._chance(a.mixup + a.cutmix)
        if a.mixup:
            share = torch.where(choice < mixup, per_image(draw.of(self._mixup_quantiles)), share)
        if a.cutmix:
            kept = draw.of(self._cutmix_quantiles)
            pasted = cutmix_share(kept, draw.integers(size), draw.integers(size), size)
            share = torch.where((choice >= mixup) & (choice < both), pasted, share)
        return mix(images, targets, share)


def _part_shares(draw: Draws, aspects: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Height and width (B,), as shares of images of these aspects, as torchvision's RandomResizedCrop draws them."""
    area = draw.uniform(scale, 1.0, CROP_TRIES) * aspects[:, None]
    ratio = draw.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1]), CROP_TRIES).exp_()
    height, width = (area / ratio).sqrt_(), (area * ratio).sqrt_() / aspects[:, None]
    # Of equals, argmax takes the first; where no try fits, the first is cut at the image's border.
    first = ((height <= 1) & (width <= 1)).int().argmax(1, keepdim=True)
    return height.gather(1, first).view(-1).clamp_(max=1), width.gather(1, first).view(-1).clamp_(max=1)


def _erased_sizes(draw: Draws, size: int) -> tuple[Tensor, Tensor]:
    """Height and width (B,), float32, in pixels, as torchvision's RandomErasing draws them."""
    area = draw.uniform(*ERASED_AREA, ERASING_TRIES) * size**2
    ratio = draw.uniform(math.log(ERASED_RATIO[0]), math.log(ERASED_RATIO[1]), ERASING_TRIES).exp_()
    height, width = (area * ratio).sqrt_().round_(), (area / ratio).sqrt_().round_()
    # Of equals, argmax takes the first. A try fails at a rate below 2 %, so ten at less than 1e-17.
    first = ((height < size) & (width < size)).int().argmax(1, keepdim=True)
    return height.gather(1, first).view(-1), width.gather(1, first).view(-1)


def _unit(images: Tensor) -> Tensor:
    return images.float().div_(255)


def _standardise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return (images - mean[:, None, None]).div_(std[:, None, None])
