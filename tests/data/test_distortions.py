"""Each distortion equals the authors' arithmetic for one image after the other, restated here, at equal draws."""

import colorsys
import math
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
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

DICE = np.random.default_rng(0)
PIXELS = DICE.integers(0, 256, (4, 3, 32, 32)).astype(np.uint8)  # noise: nothing is hidden in flat areas
IMAGES = torch.from_numpy(PIXELS) / 255


def as_hwc(images: Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).double().numpy()


def test_whole_levels_survive_being_rounded_down() -> None:
    assert torch.equal((truncated(IMAGES) * 255).round().byte(), torch.from_numpy(PIXELS))
    levels = torch.tensor([0.2, 10.5, 10.7, 254.49, 300, -4]) / 255
    assert (truncated(levels) * 255).round().tolist() == [0, 10, 10, 254, 255, 0]
    assert (rounded(levels) * 255).round().tolist() == [0, 11, 11, 254, 255, 0]


@pytest.mark.parametrize("border", ["nearest", "reflect"])
@pytest.mark.parametrize(("sigma", "truncate"), [(0.05, 4), (0.4, 4), (6.4, 3)])
def test_gaussian_blur_is_scipys(border: str, sigma: float, truncate: float) -> None:
    ours = filtered(IMAGES[:1], gaussian_matrix(32, sigma, truncate, border))[0].numpy()
    theirs = ndimage.gaussian_filter(IMAGES[0].double().numpy(), (0, sigma, sigma), mode=border, truncate=truncate)
    assert np.abs(ours - theirs).max() < 1e-6


@pytest.mark.parametrize("factor", [1, 1.01, 1.25, 1.75, 2.25])
def test_zoom_is_scipys_cut_to_the_middle(factor: float) -> None:
    part = math.ceil(32 / factor)
    top = (32 - part) // 2
    theirs = ndimage.zoom(IMAGES[0, 0].double().numpy()[top : top + part, top : top + part], factor, order=1)
    trim = (len(theirs) - 32) // 2
    ours = zoomed(IMAGES[:1, :1], factor)[0, 0].numpy()
    assert np.abs(ours - theirs[trim : trim + 32, trim : trim + 32]).max() < 1e-6


@pytest.mark.parametrize(("radius", "sigma"), [(0.3, 0.4), (0.5, 0.6), (1.5, 0.1), (9.2, 0.9)])
def test_defocus_convolves_with_a_smoothed_disk(radius: float, sigma: float) -> None:
    x, y = np.meshgrid(np.arange(-12, 13), np.arange(-12, 13))
    disk = (x**2 + y**2 <= radius**2).astype(float)
    smooth = np.exp(-(np.arange(-2, 3) ** 2) / (2 * sigma**2)) * ([0, 1, 1, 1, 0] if radius <= 8 else 1)
    kernel = ndimage.convolve(disk / disk.sum(), np.outer(smooth, smooth) / smooth.sum() ** 2, mode="constant")
    theirs = ndimage.correlate(IMAGES[0, 1].double().numpy(), kernel, mode="mirror")
    assert np.abs(convolved(IMAGES[:1], disk_kernel(radius, sigma))[0, 1].numpy() - theirs).max() < 1e-6


def motion_by_pixel(image: np.ndarray, degrees: float, radius: float, sigma: float) -> np.ndarray:
    """ImageMagick's MotionBlurImage on levels (S, S)."""
    width = 2 * math.ceil(radius) + 1
    kernel = np.exp(-(np.arange(width) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    result, size = np.zeros(image.shape), len(image)
    for tap, weight in enumerate(kernel):
        right = math.ceil(tap * math.cos(math.radians(degrees)) - 0.5)
        down = math.ceil(tap * math.sin(math.radians(degrees)) - 0.5)
        rows, columns = np.clip(np.arange(size) + down, 0, size - 1), np.clip(np.arange(size) + right, 0, size - 1)
        result += weight * image[np.ix_(rows, columns)]
    return np.floor(result + 0.5)


@pytest.mark.parametrize(("radius", "sigma"), [(6, 1), (9, 2.5), (14, 12)])
def test_motion_blur_is_imagemagicks(radius: float, sigma: float) -> None:
    degrees = torch.tensor([-44.0, 3.0, 30.0, -120.0])
    ours = (motion_blurred(IMAGES, degrees, radius, sigma) * 255).round().numpy()
    for number, angle in enumerate(degrees.tolist()):
        theirs = motion_by_pixel(PIXELS[number, 0].astype(float), angle, radius, sigma)
        assert np.mean(ours[number, 0] != theirs) < 0.001


@pytest.mark.parametrize("rounds", [1, 2])
def test_glass_blur_is_the_authors_loop(rounds: int) -> None:
    """Their exchange of two views copies one pixel over the other, which the restated loop does as well."""
    moves = DICE.integers(-1, 1, (rounds, 4, 2, 32, 32))
    blur = gaussian_matrix(32, 0.4, 4, "nearest")
    ours = as_hwc(glass_blurred(IMAGES, list(torch.from_numpy(moves)), 1, blur))
    for number, image in enumerate(as_hwc(IMAGES)):
        x = np.uint8(ndimage.gaussian_filter(image, (0.4, 0.4, 0), mode="nearest", truncate=4) * 255)
        for turn in range(rounds):
            for row in range(31, 1, -1):
                for column in range(31, 1, -1):
                    down, right = moves[turn, number, :, row, column]
                    x[row, column], x[row + down, column + right] = x[row + down, column + right], x[row, column]
        theirs = ndimage.gaussian_filter(x / 255, (0.4, 0.4, 0), mode="nearest", truncate=4)
        differences = np.abs(ours[number] - theirs)
        assert differences.max() < 1 / 255 and np.mean(differences > 1e-5) < 0.03, (
            "where a blurred level is nearly whole"
        )


def test_plasma_is_the_diamond_square_fractal() -> None:
    noise = [DICE.uniform(-1, 1, (1, 3, 1 << octave, 1 << octave)) for octave in range(5)]
    heights = np.zeros((32, 32))
    for octave, of_octave in enumerate(noise):
        step = 32 >> octave
        half = step // 2
        diagonal = [(-half, -half), (-half, half), (half, -half), (half, half)]
        straight = [(half, 0), (-half, 0), (0, half), (0, -half)]
        for place, (down, right, around) in enumerate(
            [(half, half, diagonal), (0, half, straight), (half, 0, straight)]
        ):
            for row, column in np.ndindex(1 << octave, 1 << octave):
                y, x = row * step + down, column * step + right
                mean = np.mean([heights[(y + dy) % 32, (x + dx) % 32] for dy, dx in around])
                heights[y, x] = mean + of_octave[0, place, row, column] / 1.75 ** (2 * octave)
    heights -= heights.min()
    ours = plasma(32, 1.75, [torch.from_numpy(of_octave) for of_octave in noise])[0, 0].numpy()
    assert np.abs(ours - heights / heights.max()).max() < 1e-6


def test_fog_keeps_the_brightest_pixel() -> None:
    clouds = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    dark = IMAGES * torch.tensor([1, 0.5, 0.7, 0.9])[:, None, None, None]
    for ours, image, cloud in zip(as_hwc(fogged(dark, clouds, 0.75)), as_hwc(dark), as_hwc(clouds), strict=True):
        assert np.abs(ours - (image + 0.75 * cloud) * image.max() / (image.max() + 0.75)).max() < 1e-6


def test_snow_whitens_and_adds_flakes_twice() -> None:
    flakes = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    for ours, image, flake in zip(as_hwc(snowed(IMAGES, flakes, 0.85)), as_hwc(IMAGES), as_hwc(flakes), strict=True):
        grey = image @ [0.299, 0.587, 0.114]
        theirs = 0.85 * image + 0.15 * np.maximum(image, grey[..., None] * 1.5 + 0.5) + flake + np.rot90(flake, k=2)
        assert np.abs(ours - theirs).max() < 1e-6


def test_brightness_raises_the_value_of_hsv() -> None:
    some = IMAGES[:1, :, :8, :8].clone()
    some[..., 0, 0] = 0  # black turns grey
    ours = as_hwc(brightened(some, 0.3))[0].reshape(-1, 3)
    for pixel, raised in zip(as_hwc(some)[0].reshape(-1, 3), ours, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        assert np.abs(raised - colorsys.hsv_to_rgb(hue, saturation, min(value + 0.3, 1))).max() < 1e-6


def test_contrast_keeps_each_channels_mean() -> None:
    ours = flattened(IMAGES, 0.4)
    assert torch.allclose(ours.mean((2, 3)), IMAGES.mean((2, 3)), atol=1e-6)
    assert torch.allclose(ours.std((2, 3)), 0.4 * IMAGES.std((2, 3)), atol=1e-6)


def test_elastic_moves_by_an_affine_map_and_then_a_field() -> None:
    corners, field = DICE.uniform(-2, 2, (4, 3, 2)), DICE.uniform(-2, 2, (4, 2, 32, 32))
    ours = as_hwc(elastically_moved(IMAGES, torch.from_numpy(corners), torch.from_numpy(field)))
    square = np.array([[26.0, 26], [26, 6], [6, 6]])
    for number, image in enumerate(as_hwc(IMAGES)):
        to_source = np.linalg.solve(np.c_[square + corners[number], np.ones(3)], square)
        columns, rows = np.meshgrid(np.arange(32), np.arange(32))
        x, y = np.moveaxis(np.stack([columns, rows, np.ones((32, 32))], 2) @ to_source, 2, 0)
        first = ndimage.map_coordinates(image[..., 0], (y, x), order=1, mode="mirror")
        right, down = field[number]
        theirs = ndimage.map_coordinates(first, (rows + down, columns + right), order=1, mode="reflect")
        assert np.abs(ours[number, ..., 0] - theirs).max() < 1e-4


@pytest.mark.parametrize("share", [0.95, 0.85, 0.65])
def test_pixelate_is_pillows_box_filter(share: float) -> None:
    side = int(32 * share)
    ours = (pixelated(IMAGES, side) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for number, pixels in enumerate(PIXELS):
        image = Image.fromarray(np.moveaxis(pixels, 0, 2))
        small = image.resize((side, side), Image.Resampling.BOX)
        assert np.array_equal(ours[number], np.asarray(small.resize((32, 32), Image.Resampling.BOX)))


def test_jpeg_is_pillows() -> None:
    Image.fromarray(np.moveaxis(PIXELS[1], 0, 2)).save(file := BytesIO(), "JPEG", quality=40)
    theirs = np.moveaxis(np.asarray(Image.open(file)), 2, 0)
    assert np.array_equal(compressed(torch.from_numpy(PIXELS), 40)[1].numpy(), theirs)
