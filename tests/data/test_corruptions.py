"""The 15 corruptions: strengths, draws, grey images and other sizes; their arithmetic is tested in test_distortions.py."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pipeline.data.corruptions import KINDS, STRENGTHS, corrupted, generator_of


def smooth(size: int, count: int = 16) -> Tensor:
    """uint8 (count, 3, size, size), coloured blobs."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return (interpolate(coarse, size, mode="bilinear") * 255).byte()


def changed(images: Tensor, kind: str, strength: int, seed: int = 0) -> Tensor:
    return corrupted(images, kind, strength, generator_of(kind, strength, seed))


GREY = torch.full((64, 3, 32, 32), 128, dtype=torch.uint8) + torch.tensor([0, 1, 2], dtype=torch.uint8)[:, None, None]


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_fixes_what_comes_out(kind: str) -> None:
    images = smooth(32)
    one, again, other = (changed(images, kind, 3, seed) for seed in (0, 0, 1))
    assert one.dtype == torch.uint8 and one.shape == images.shape
    assert torch.equal(one, again)
    is_drawn = kind not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg")
    assert torch.equal(one, other) != is_drawn


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_other_sizes_and_without_colours_are_taken(kind: str) -> None:
    for size in (8, 48):
        images = smooth(size, 4)
        assert changed(images, kind, 5).shape == images.shape
        grey = images[:, :1].expand(-1, 3, -1, -1)
        result = changed(torch.cat([images, grey]), kind, 5)
        assert torch.equal(result[4:, 0], result[4:, 1]) and torch.equal(result[4:, 0], result[4:, 2])
        assert not torch.equal(result[:4, 0], result[:4, 1])


def test_noise_has_the_spread_that_was_asked_for() -> None:
    for strength, sd, photons, share in ((1, 0.04, 500, 0.01), (5, 0.10, 50, 0.07)):
        noise = (changed(GREY, "gaussian_noise", strength).double() - GREY).std().item()
        assert noise == pytest.approx(255 * sd, rel=0.01)
        shots = (changed(GREY, "shot_noise", strength).double() - GREY).std().item()
        assert shots == pytest.approx(255 * np.sqrt(129 / 255 / photons), rel=0.01)
        impulses = changed(GREY, "impulse_noise", strength)
        for level in (0, 255):
            assert (impulses == level).double().mean().item() == pytest.approx(share / 2, rel=0.05)


def test_frost_has_the_colours_and_contrast_of_the_photographs() -> None:
    ice = (changed(GREY - 128, "frost", 5).double() + 0.5) / 0.45  # black, but for a trace of colour
    red, green, blue = ice.mean((0, 2, 3)).tolist()
    assert 140 < red < green < blue < 190
    assert ice.std((2, 3)).mean().item() == pytest.approx(15, abs=1)
    assert ice.mean((1, 2, 3)).std().item() == pytest.approx(37, abs=6)


# Mean change of the same images, in levels, by strength.
CHANGES = {
    "gaussian_noise": (8.129, 12.113, 16.207, 18.138, 20.01),
    "shot_noise": (6.173, 8.721, 13.727, 15.885, 19.28),
    "impulse_noise": (1.308, 2.549, 3.793, 6.273, 9.238),
    "defocus_blur": (0.406, 0.546, 0.707, 0.788, 1.221),
    "glass_blur": (5.455, 5.439, 5.517, 10.083, 10.017),
    "motion_blur": (3.631, 6.644, 8.195, 9.154, 10.806),
    "zoom_blur": (4.851, 5.099, 6.355, 7.549, 9.03),
    "snow": (10.288, 25.357, 27.125, 41.5, 54.458),
    "frost": (29.719, 48.14, 52.394, 51.718, 46.579),
    "fog": (10.119, 19.19, 24.29, 30.928, 37.602),
    "brightness": (8.768, 17.913, 26.437, 34.212, 46.686),
    "contrast": (10.711, 21.412, 25.693, 29.965, 36.387),
    "elastic": (16.512, 10.949, 8.769, 9.909, 7.432),
    "pixelate": (1.108, 1.041, 1.645, 3.113, 3.901),
    "jpeg": (3.74, 4.749, 5.235, 5.736, 6.49),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_strengths_are_those_of_cifar_10_c(kind: str) -> None:
    """So that no constant changes unnoticed: these were measured with the authors' constants."""
    images = smooth(32, 8)
    found = [(changed(images, kind, strength).double() - images).abs().mean().item() for strength in STRENGTHS]
    assert found == pytest.approx(CHANGES[kind], rel=0.01)


@pytest.mark.parametrize(("size", "reach"), [(32, 1), (64, 2)])
def test_glass_moves_pixels_by_a_length_that_grows_with_the_image(size: int, reach: int) -> None:
    rows = torch.arange(size, dtype=torch.uint8).mul(3)[:, None].expand(1, 3, size, size)
    moved = (changed(rows, "glass_blur", 1).double() - rows).abs().max().item()
    assert moved == pytest.approx(3 * reach, abs=1)
