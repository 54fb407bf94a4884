"""Operations against torchvision's at equal parameters; those that only policies use: see test_policies.py."""

import torch
from batches import generator, one_by_one, random_images, sizes, smooth_images, torchvision_perspective
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from pipeline.data import operations


@sizes
def test_each_operation_at_its_neutral_parameter_is_the_identity(size: int) -> None:
    images, zeros, ones = smooth_images(4, size), torch.zeros(4), torch.ones(4)
    still = torch.zeros(4, 4, 2, dtype=torch.int64)
    for result in [
        operations.warp(images, operations.rotation(zeros)),
        operations.warp(images, operations.perspective(still, size)),
        operations.adjust_brightness(images, ones),
        operations.adjust_contrast(images, ones),
        operations.adjust_saturation(images, ones),
        operations.adjust_hue(images, zeros),
        operations.warp(images, operations.shear_and_move(zeros, zeros, zeros, zeros, size)),
        operations.adjust_sharpness(images, ones),
        operations.solarize(images, ones),
    ]:
        torch.testing.assert_close(result, images, rtol=0, atol=1e-4)


@sizes
def test_rotation_is_torchvisions(size: int) -> None:
    images = random_images(8, size).float() / 255
    degrees = torch.tensor([0.5, -12.0, 30.0, 45.0, 89.0, 135.0, -179.0, 0.0])
    expected = one_by_one(
        lambda image, angle: reference.rotate(image, angle, v2.InterpolationMode.BILINEAR), images, degrees
    )
    torch.testing.assert_close(operations.warp(images, operations.rotation(degrees)), expected, rtol=0, atol=1e-4)


@sizes
@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_perspective_is_torchvisions(size: int, seed: int) -> None:
    images = random_images(4, size, seed).float() / 255
    moves = torch.randint(size // 4 + 1, (4, 4, 2), generator=generator(seed))  # as at a distortion of 0.5
    result = operations.warp(images, operations.perspective(moves, size))
    for image, move, warped in zip(images, moves, result, strict=True):
        torch.testing.assert_close(warped, torchvision_perspective(image, move), rtol=0, atol=1e-3)


def test_corners_without_a_homography_give_black_and_never_nan() -> None:
    moves = torch.zeros(2, 4, 2, dtype=torch.int64)
    moves[0, 0] = 8  # top right, top left and bottom left on one line, where 17 pixels have a middle
    moves[1] = 8  # all four corners in one point
    result = operations.warp(torch.ones(2, 3, 17, 17), operations.perspective(moves, 17))
    assert result.isfinite().all()
    assert result[1].abs().max() == 0


@sizes
@given(seed=st.integers(0, 10_000), factors=st.lists(st.floats(0, 2, width=32), min_size=4, max_size=4))
@settings(max_examples=20, deadline=None)
def test_brightness_contrast_and_saturation_are_torchvisions(size: int, seed: int, factors: list[float]) -> None:
    images, factor = random_images(4, size, seed).float() / 255, torch.tensor(factors)
    for ours, theirs in [
        (operations.adjust_brightness, reference.adjust_brightness),
        (operations.adjust_contrast, reference.adjust_contrast),
        (operations.adjust_saturation, reference.adjust_saturation),
    ]:
        torch.testing.assert_close(ours(images, factor), one_by_one(theirs, images, factor), rtol=0, atol=1e-5)


@given(seed=st.integers(0, 10_000), turns=st.lists(st.floats(-0.5, 0.5, width=32), min_size=4, max_size=4))
@settings(max_examples=20, deadline=None)
def test_hue_is_torchvisions(seed: int, turns: list[float]) -> None:
    shift = torch.tensor(turns)
    levels = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])  # greys, primaries and ties of two channels
    palette = torch.cartesian_prod(levels, levels, levels).t().reshape(1, 3, 5, 25).expand(4, -1, -1, -1)
    for images in (random_images(4, 32, seed).float() / 255, palette):
        expected = one_by_one(reference.adjust_hue, images, shift)
        torch.testing.assert_close(operations.adjust_hue(images, shift), expected, rtol=0, atol=1e-4)


def test_colours_beyond_0_and_1_by_a_rounding_error_are_black_and_white() -> None:
    """As `solarize` makes them of sampled white; as an index into 256 levels, -1 ended the training."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images[0, 0, 0, :2] = torch.tensor([-1e-7, 1 + 1e-6])
    for operation in (operations.equalize, lambda seen: operations.posterize(seen, torch.full((2,), 4.0))):
        assert torch.equal(operation(images), operation(images.clamp(0, 1)))
