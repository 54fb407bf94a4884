"""Crop, flip, erasing and mixing: pixels at given parameters, draws against distributions, targets against pixels."""

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from batches import (
    MEAN,
    OFF,
    STD,
    NoSynchronisation,
    assert_same_distribution,
    augmenter,
    colours,
    generator,
    random_images,
    sizes,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as reference

from pipeline.data import augment
from pipeline.data.augment import Augmenter, RandomCrop, _part_shares, part
from pipeline.data.draws import Draws
from pipeline.sections.augmentation import Custom

EVERYTHING: dict[str, Any] = {
    "rotation": 30.0,
    "perspective": 0.5,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.2,
    "erasing": 0.5,
    "mixup": 0.4,
    "cutmix": 0.4,
}
STEPS: list[dict[str, Any]] = [
    {"crop_padding": 4},
    {"crop_padding": 4, "crop_mode": "constant"},
    {"rotation": 15.0},
    {"perspective": 0.5, "perspective_probability": 1.0},
    {"brightness": 0.4},
    {"contrast": 0.4},
    {"saturation": 0.4},
    {"hue": 0.2},
    {"erasing": 1.0},
    {"mixup": 1.0, "mixup_alpha": 1.0},
    {"cutmix": 1.0},
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# What every batch is.


@sizes
def test_normalise_is_torchvisions_and_channels_last(size: int) -> None:
    images = random_images(5, size)
    result = augment.normalise(images, MEAN, STD)
    torch.testing.assert_close(result, reference.normalize(images.float() / 255, MEAN.tolist(), STD.tolist()))
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)


@sizes
def test_a_recipe_of_zeros_gives_the_images_as_evaluation_sees_them(size: int) -> None:
    images, indices = random_images(20, size), torch.tensor([3, 17, 3, 0])
    result, targets = augmenter(images).batch(indices, generator())
    assert torch.equal(result, augment.normalise(images[indices], MEAN, STD))
    assert torch.equal(targets, torch.eye(10)[[3, 7, 3, 0]])


def test_erasing_and_mixing_at_neutral_parameters_are_the_identity() -> None:
    images, zeros, ones = random_images(4).float() / 255, torch.zeros(4), torch.ones(4)
    assert torch.equal(augment.erase(images, zeros, zeros, zeros, ones), images)
    assert torch.equal(augment.mix(images, torch.eye(4), augment.cutmix_share(ones, zeros, zeros, 16))[0], images)


@sizes
@pytest.mark.parametrize("changes", [{}, {"perspective": 1.0, "crop_mode": "constant", "rotation": 180.0, "hue": 0.5}])
def test_batches_with_all_steps_on_are_finite(size: int, changes: Any) -> None:
    made = augmenter(random_images(300, size), **({"crop_padding": 4, "horizontal_flip": 0.5} | EVERYTHING | changes))
    images, targets = made.batch(torch.arange(300), generator())
    assert images.shape == (300, 3, size, size)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.dtype == targets.dtype == torch.float32
    assert images.isfinite().all()
    assert (images >= -MEAN.view(3, 1, 1) / STD.view(3, 1, 1) - 1e-4).all()
    assert (images <= (1 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1) + 1e-4).all()
    assert (targets >= 0).all()
    torch.testing.assert_close(targets.sum(1), torch.ones(300))


def test_the_generators_state_decides_every_bit() -> None:
    made, indices, state = augmenter(random_images(50), **EVERYTHING), torch.arange(50), generator()
    first, second = made.batch(indices, state), made.batch(indices, state)
    again = made.batch(indices, generator())
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("changes", STEPS, ids=lambda changes: "-".join(changes))
def test_each_image_of_a_batch_gets_its_own_draw(changes: Any) -> None:
    images = random_images(2)
    indices = torch.tensor([0, 1]).repeat(32)  # two images, so that mixing has something to mix
    result, _ = augmenter(images, **changes).batch(indices, generator())
    assert len(result[::2].flatten(1).unique(dim=0)) > 16


def test_views_share_all_but_what_the_policy_does() -> None:
    images, views = random_images(20), {"policy": "augmix", "consistency": 12.0}
    own, one, other = augmenter(images, **views).batch(torch.arange(20), generator())[0].chunk(3)
    assert torch.equal(own, augment.normalise(images, MEAN, STD))
    assert not torch.equal(one, own) and not torch.equal(one, other)
    erased, targets = augmenter(images, **views, erasing=1.0).batch(torch.arange(20), generator())
    own, one, other = (erased == 0).all(1).chunk(3)  # in all channels; one alone may be the mean by chance
    assert own.any() and torch.equal(own, one) and torch.equal(own, other) and len(targets) == 20
    mixed = augmenter(images, **views, mixup=1.0).batch(torch.arange(20), generator())[0].chunk(3)
    assert (mixed[0] - mixed[1]).abs().mean() < 0.6 * (mixed[0] - mixed[1].roll(1, 0)).abs().mean()


def test_no_step_waits_for_the_device() -> None:
    made = augmenter(random_images(20), crop_padding=4, horizontal_flip=0.5, **EVERYTHING)
    indices, state, values = torch.arange(20), generator(), torch.rand(3)
    with NoSynchronisation():
        made.batch(indices, state)
        for waits in [values.sum().item, values.nonzero, lambda: values[values > 0.5], lambda: torch.tensor([1.0])]:
            with pytest.raises(AssertionError):
                waits()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_waits_and_bits_repeat() -> None:
    images, labels = random_images(64).cuda(), torch.arange(64).cuda() % 10
    made = Augmenter(images, labels, 10, MEAN.cuda(), STD.cuda(), Custom(**EVERYTHING))
    indices, states = torch.arange(64).cuda(), [torch.Generator("cuda").manual_seed(0) for _ in range(2)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = [made.batch(indices, state) for state in states]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(batches[0][0], batches[1][0])
    assert torch.equal(batches[0][1], batches[1][1])


# Crop and flip.


@given(size=st.integers(8, 33), padding=st.integers(0, 7), mode=st.sampled_from(["reflect", "constant"]))
@settings(max_examples=30, deadline=None)
def test_padding_is_torchs(size: int, padding: int, mode: str) -> None:
    images = random_images(2, size)
    expected = torch.nn.functional.pad(images.float(), [padding] * 4, mode=mode)
    assert torch.equal(augment.pad(images, padding, mode), expected.byte())


@sizes
def test_a_crop_is_the_window_mirrored_where_asked(size: int) -> None:
    padded, indices = random_images(6, size + 8), torch.tensor([5, 0, 5, 2])
    top, left = torch.tensor([0, 8, 3, 4]), torch.tensor([8, 0, 1, 4])
    result = augment.crop(padded, indices, top, left, torch.tensor([False, True, True, False]), size)
    for image, index, y, x, flip in zip(result, indices, top, left, [0, 1, 1, 0], strict=True):
        window = padded[index, :, y : y + size, x : x + size]
        assert torch.equal(image, window.flip(-1) if flip else window)
    assert result.dtype == torch.uint8


def test_crops_are_uniform_and_half_of_them_mirrored() -> None:
    places = torch.arange(1, 17, dtype=torch.uint8).expand(16, 16)
    image = torch.stack([places.t(), places, torch.full_like(places, 255)])[None]
    centre = (colours(image, 8100, crop_padding=4, crop_mode="constant")[:, :2, 8, 8] * 255).round().long() - 9
    counts = torch.bincount((centre[:, 0] + 4) * 9 + centre[:, 1] + 4, minlength=81)
    assert len(counts) == 81
    assert stats.chisquare(counts.numpy()).pvalue > 0.01

    corner = (colours(image, 4000, horizontal_flip=0.3)[:, 1, 0, 0] * 255).round()
    assert set(corner.tolist()) == {1.0, 16.0}
    assert stats.binomtest(int((corner == 16).sum()), 4000, 0.3).pvalue > 0.01


def mirrored_by_epoch(count: int, epochs: int, seed: int = 0, indices: Tensor | None = None) -> Tensor:
    """bool (epochs, count): which images an alternating flip mirrors."""
    image = torch.arange(16, dtype=torch.uint8).expand(1, 3, 16, 16)
    labels, settings = torch.zeros(count, dtype=torch.int64), Custom(**OFF | {"horizontal_flip": "alternating"})
    made = Augmenter(image.repeat(count, 1, 1, 1), labels, 1, torch.zeros(3), torch.ones(3), settings, seed)
    seen = []
    for epoch in range(1, epochs + 1):
        made.start_epoch(epoch)
        images, _ = made.batch(torch.arange(count) if indices is None else indices, generator(epoch))
        seen.append(images[:, 0, 0, 0] > 0)
    return torch.stack(seen)


def test_alternating_flip_shows_both_ways_in_two_epochs() -> None:
    first, *others = mirrored_by_epoch(4000, 5)
    assert stats.binomtest(int(first.sum()), 4000, 0.5).pvalue > 0.01
    for epoch, mirrored in enumerate(others, start=2):
        assert torch.equal(mirrored, first if epoch % 2 else ~first), epoch


def test_an_alternating_flip_belongs_to_the_image_and_the_seed() -> None:
    order = torch.randperm(200, generator=generator())
    assert torch.equal(mirrored_by_epoch(200, 2, indices=order), mirrored_by_epoch(200, 2)[:, order])
    assert not torch.equal(mirrored_by_epoch(200, 1, seed=1), mirrored_by_epoch(200, 1))


def test_constant_padding_is_black_and_reflection_mirrors() -> None:
    white = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    assert colours(white, 50, crop_padding=4, crop_mode="constant").amin() == 0
    assert colours(white, 50, crop_padding=4, crop_mode="reflect").amin() == 1


def test_the_widest_padding_that_a_recipe_allows_can_be_made() -> None:
    images = random_images(2)
    augmenter(images, crop_padding=15)
    augmenter(images, crop_padding=16, crop_mode="constant")


# Erasing.


@sizes
def test_erasing_fills_only_the_rectangle_with_the_mean(size: int) -> None:
    images = torch.randn(3, 3, size, size, generator=generator())
    box = [torch.tensor(values) for values in ([0, 5, 3], [2, 0, 8], [4, size - 5, 0], [3, 7, 6])]
    expected = images.clone()
    for image, top, left, height, width in zip(expected, *(values.tolist() for values in box), strict=True):
        image[:, top : top + height, left : left + width] = 0
    assert torch.equal(augment.erase(images, *box), expected)


def boxes(images: Tensor) -> Tensor:
    """(B, 4): top, left, height and width of the zeros in white images (B, 3, S, S)."""
    erased = images.abs().amax(1) == 0
    rows, columns = erased.any(2).int(), erased.any(1).int()
    assert torch.equal(erased.sum((1, 2)), rows.sum(1) * columns.sum(1))
    return torch.stack([rows.argmax(1), columns.argmax(1), rows.sum(1), columns.sum(1)], dim=1)


@sizes
def test_rectangles_are_distributed_as_torchvisions(size: int) -> None:
    white, other = torch.full((1, 3, size, size), 255, dtype=torch.uint8), v2.RandomErasing(p=1.0)
    torch.manual_seed(0)
    drawn = [other.make_params([torch.ones(3, size, size)]) for _ in range(4000)]
    expected = torch.tensor([[place[name] for name in "ijhw"] for place in drawn])
    result = boxes(colours(white, 4000, erasing=1.0))
    for start, length in [(result[:, 0], result[:, 2]), (result[:, 1], result[:, 3])]:
        rate = 1 / (size + 1 - length)  # of every possible place
        error = (rate * (1 - rate)).sum().sqrt()
        assert abs((start == 0).sum() - rate.sum()) < 4 * error
        assert abs((start + length == size).sum() - rate.sum()) < 4 * error
    for column in range(4):
        assert_same_distribution(result[:, column], expected[:, column])
    assert_same_distribution(result[:, 2] / result[:, 3], expected[:, 2] / expected[:, 3])
    assert_same_distribution(result[:, 2] * result[:, 3], expected[:, 2] * expected[:, 3])

    erased = (colours(white, 4000, erasing=0.3) == 0).flatten(1).any(1)
    assert stats.binomtest(int(erased.sum()), 4000, 0.3).pvalue > 0.01


def test_erased_pixels_are_zero_after_normalising() -> None:
    images = torch.full((50, 3, 16, 16), 255, dtype=torch.uint8)
    result, _ = augmenter(images, erasing=1.0).batch(torch.arange(50), generator())
    assert (boxes(result)[:, 2:] > 0).all()


# Mixing.


def flat_images(count: int) -> Tensor:
    """Constant colours, each far from the one before it."""
    levels = torch.arange(count) * 100 % 251
    return levels.to(torch.uint8)[:, None, None, None].expand(-1, 3, 16, 16).contiguous()


def mixed(count: int, **changes: Any) -> tuple[Tensor, Tensor]:
    """For constant images with labels of their own: each pixel's own share (count, 16, 16), and the targets."""
    images = flat_images(count)
    made = Augmenter(images, torch.arange(count), count, torch.zeros(3), torch.ones(3), Custom(**(OFF | changes)))
    result, targets = made.batch(torch.arange(count), generator())
    own = images[:, 0] / 255
    partner = own.roll(1, dims=0)
    return (result[:, 0] - partner) / (own - partner), targets


@pytest.mark.parametrize("changes", [{"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 0.4}])
def test_targets_say_how_much_of_each_image_the_pixels_hold(changes: Any) -> None:
    share, targets = mixed(200, mixup_alpha=1.0, **changes)
    own = share.mean((1, 2))
    torch.testing.assert_close(targets.diagonal(), own, rtol=0, atol=1e-4)
    before = targets[torch.arange(200), torch.arange(200) - 1]
    torch.testing.assert_close(before, 1 - own, rtol=0, atol=1e-4)
    torch.testing.assert_close(targets.sum(1), torch.ones(200))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_mixups_blend_is_beta(alpha: float) -> None:
    share, targets = mixed(2000, mixup=1.0, mixup_alpha=alpha)
    assert (share.amax((1, 2)) - share.amin((1, 2))).max() < 1e-4
    assert stats.kstest(targets.diagonal().numpy(), stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_cutmix_pastes_a_square_of_the_drawn_area() -> None:
    kept, centre = torch.tensor([0.75, 0.75, 0.0, 1.0]), torch.tensor([8, 1, 15, 3])
    pasted = 1 - augment.cutmix_share(kept, centre, centre, 16)
    expected = torch.zeros(4, 1, 16, 16)
    expected[0, :, 4:12, 4:12] = expected[1, :, :5, :5] = expected[2, :, 7:, 7:] = 1
    assert torch.equal(pasted, expected)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_cutmix_squares_are_distributed_as_torchvisions(alpha: float) -> None:
    share, _ = mixed(2000, cutmix=1.0, cutmix_alpha=alpha)
    assert torch.equal(share, share.round())
    other, labels = v2.CutMix(alpha=alpha, num_classes=2), torch.tensor([0, 1])
    pair = torch.stack([torch.zeros(1, 16, 16), torch.ones(1, 16, 16)])
    torch.manual_seed(0)
    expected = 1 - torch.stack([other(pair, labels)[0][0, 0] for _ in range(1000)])
    for area in [np.s_[:], np.s_[:, :8, :8], np.s_[:, 0], np.s_[:, :, 15]]:
        assert_same_distribution(share[area].flatten(1).mean(1), expected[area].flatten(1).mean(1))


def test_mixup_and_cutmix_occur_at_the_recipes_rates() -> None:
    share, _ = mixed(3000, mixup=0.3, mixup_alpha=2.0, cutmix=0.5, cutmix_alpha=2.0)
    blended = ((share > 1e-3) & (share < 1 - 1e-3)).flatten(1)
    assert torch.equal(blended.any(1), blended.all(1))  # never both
    assert stats.binomtest(int(blended.any(1).sum()), 3000, 0.3).pvalue > 0.01
    # Beta(2, 2) pastes less than 1 / 64, which leaves no pixel, at a rate of 0.0007 only.
    pasted = ~blended.any(1) & (share.mean((1, 2)) < 0.999)
    assert stats.binomtest(int(pasted.sum()), 3000, 0.5).pvalue > 0.01


def test_images_are_padded_once_until_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    padded: list[Tensor] = []

    def pad(*arguments: Any) -> Tensor:
        padded.append(augment_pad(*arguments))
        return padded[-1]

    augment_pad = augment.pad
    monkeypatch.setattr(augment, "pad", pad)
    images, others = random_images(20), random_images(20)
    before = augmenter(images, crop_padding=2).batch(torch.arange(20), generator())[0]
    assert torch.equal(augmenter(images, crop_padding=2).batch(torch.arange(20), generator())[0], before)
    assert len(padded) == 1
    assert torch.equal(padded[0], augment_pad(images, 2, "reflect")), "training doesn't write to it"
    for count, changes in enumerate([{"crop_padding": 3}, {"crop_padding": 3, "crop_mode": "constant"}], start=2):
        augmenter(images, **changes)
        augmenter(images, **changes)
        assert len(padded) == count
    augmenter(others, crop_padding=3, crop_mode="constant")
    assert len(padded) == 4
    images += 1  # in place
    assert augmenter(images, crop_padding=3, crop_mode="constant")._padded.data_ptr() == padded[4].data_ptr()


def test_without_padding_images_are_not_copied() -> None:
    images = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    assert augment._padded_once(images, 0, "reflect").data_ptr() == images.data_ptr()


def test_padded_images_live_as_long_as_their_images() -> None:
    images = random_images(20)
    first = weakref.ref(augmenter(images, crop_padding=2)._padded)
    assert first() is not None
    second = weakref.ref(augmenter(images, crop_padding=3)._padded)
    assert first() is None
    del images
    assert second() is None


@pytest.mark.parametrize("mirrored", [False, True])
def test_part_of_an_image_equals_torchvisions_resized_crop(mirrored: bool) -> None:
    """Where the part is not smaller than its source, so that averaging makes no difference."""
    image = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    expected = reference.resized_crop(image, top=10, left=4, height=10, width=20, size=[20, 20], antialias=False)
    y, x, height, width = (torch.tensor([value]) for value in (15 / 20 - 1, 14 / 20 - 1, 0.25, 0.5))
    found = part(image, y, x, height, -width if mirrored else width, 20)
    expected = expected.flip(-1) if mirrored else expected
    torch.testing.assert_close(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], rtol=0, atol=1e-5)


def test_random_parts_have_the_drawn_area_and_aspect_of_the_image_as_it_was() -> None:
    """torchvision's RandomResizedCrop on the unsquashed images is the reference."""
    count, scale = 4000, 0.3
    aspects = torch.tensor([2.0]).expand(count)
    draw = Draws(count, torch.Generator().manual_seed(0))
    height, width = _part_shares(draw, aspects, scale)
    image = torch.zeros(3, 100, 200)
    torch.manual_seed(0)
    drawn = [RandomResizedCrop.get_params(image, [scale, 1.0], [3 / 4, 4 / 3])[2:] for _ in range(count)]
    theirs = torch.tensor(drawn)
    assert max(height.max(), width.max()) <= 1 and (height * width).min() >= 0.3
    for mine, other in ((height, theirs[:, 0] / 100), (width, theirs[:, 1] / 200)):
        torch.testing.assert_close(mine.mean(), other.mean(), rtol=0, atol=0.01)
        torch.testing.assert_close(mine.std(), other.std(), rtol=0, atol=0.01)


def test_random_parts_come_at_the_networks_size_and_differ() -> None:
    images = torch.randint(0, 256, (6, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    cut = RandomCrop(8, 0.3, torch.ones(6))
    settings = Custom(**(OFF | {"horizontal_flip": 0.5}))
    made = Augmenter(images, torch.arange(6), 6, torch.zeros(3), torch.ones(3), settings, cut=cut)
    batches = [made.batch(torch.arange(6), torch.Generator().manual_seed(seed))[0] for seed in (0, 0, 1)]
    assert batches[0].shape == (6, 3, 8, 8) and 0 <= batches[0].min() <= batches[0].max() <= 1
    assert torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])


def test_strength_is_the_share_of_images_that_change() -> None:
    """By policy, erasing and mixing; in place, as a captured batch reads it there."""
    images = flat_images(400)
    changes: dict[str, Any] = OFF | {"brightness": 0.4, "erasing": 0.3, "mixup": 0.2, "cutmix": 0.2}
    made = Augmenter(images, torch.arange(400), 400, torch.zeros(3), torch.ones(3), Custom(**changes))
    counts = []
    for strength in (0.0, 0.5, 1.0):
        made.start_epoch(1, strength)
        batch, targets = made.batch(torch.arange(400), generator())
        counts.append(
            [len(of) for of in ((batch != images / 255).any(3).any(2).any(1).nonzero(), (targets == 1).nonzero())]
        )
    (changed, pure), half, full = counts
    assert (changed, pure) == (0, 400)
    assert 200 < half[0] < 340 and full[0] > 390, "half by the policy, some more by erasing and mixing"
    assert 310 < half[1] < 350 and 240 < full[1] < 290, "mixed: up to a fifth, and up to two"
