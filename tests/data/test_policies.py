"""Policies against torchvision's at equal draws, their draws against distributions, both ways to apply an operation."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from batches import (
    MEAN,
    STD,
    NoSynchronisation,
    assert_same_distribution,
    augmenter,
    colours,
    generator,
    one_by_one,
    random_images,
    sizes,
    smooth_images,
    torchvision_perspective,
)
from scipy import stats
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from pipeline.data import policies
from pipeline.data.draws import Draws
from pipeline.data.policies import OPERATIONS, operate, policy_of
from pipeline.sections.augmentation import Augmentation, AugMix, RandAugment, TrivialAugment

CPU = torch.device("cpu")
POLICIES: list[Augmentation] = [
    TrivialAugment(),
    RandAugment(),
    RandAugment(operations=4, magnitude=30),
    AugMix(),
    AugMix(severity=10, width=2, depth=2, alpha=0.1),
]
each_policy = pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.policy)
SPACES = {"trivialaugment": (policies._WIDE, v2.TrivialAugmentWide), "randaugment": (policies._NARROW, v2.RandAugment)}
SPACES["augmix"] = policies._MIXED, v2.AugMix
THEIRS = {
    "identity": "Identity",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateX",
    "translate_y": "TranslateY",
    "autocontrast": "AutoContrast",
} | {name: name.capitalize() for name in OPERATIONS if "_" not in name and name not in ("identity", "autocontrast")}


def photos(count: int, size: int = 32) -> Tensor:
    """float32, whole levels: smooth, with noise, and a flat channel."""
    images = smooth_images(count, size) + torch.rand(count, 3, size, size, generator=generator()) * 0.1
    images[-1, 1] = 0.5
    return (images * 255).round() / 255


def by_torchvision(image: Tensor, name: str, magnitude: float) -> Tensor:
    """A transform of bilinear sampling, as its policies call it."""
    bilinear, black = v2.InterpolationMode.BILINEAR, {}
    return v2.RandAugment()._apply_image_or_video_transform(image, name, magnitude, bilinear, black)


def by_torchvision_on_floats(image: Tensor, name: str, magnitude: float) -> Tensor:
    """Posterize on bytes: on floats torchvision's has other levels."""
    if name == "Posterize":
        return by_torchvision((image * 255.999).byte(), name, magnitude) / 255
    return by_torchvision(image, name, magnitude)


@pytest.mark.parametrize("policy", SPACES)
def test_each_operation_is_torchvisions_at_its_magnitudes(policy: str) -> None:
    """On bytes torchvision rounds after each step, up to twice within an operation; ours stays in floats."""
    ours, theirs = SPACES[policy]
    size, bins = 32, slice(None, None, 3)  # of smaller images TrivialAugment moves less than torchvision's
    table = policies._Space(ours, bins, size, CPU)
    image = photos(1, size)
    results = operate(image.repeat(len(table._codes), 1, 1, 1), table._codes, table._parameters)
    assert {THEIRS[name] for name in ours.operations} == set(theirs._AUGMENTATION_SPACE)
    for name in ours.operations:
        magnitudes, signed = theirs._AUGMENTATION_SPACE[THEIRS[name]]
        values = magnitudes(ours.bins, size, size)
        one_way = torch.zeros(ours.bins)[bins] if values is None else values[bins]
        both_ways = torch.cat([one_way, -one_way if signed else one_way]).tolist()
        for result, value in zip(results[table._codes == OPERATIONS.index(name)], both_ways, strict=True):
            expected = by_torchvision_on_floats(image[0], THEIRS[name], value)
            torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)
            on_bytes = by_torchvision((image[0] * 255).round().byte(), THEIRS[name], value)
            assert (result - on_bytes / 255).abs().max() < 2 / 255, (name, value)


class Scripted:
    """A transform of torchvision that draws what it is told: operations with parameters, and shares."""

    operations: Iterator[tuple[str, float]]
    shares: Iterator[Tensor]

    def _get_random_item(self, space: object) -> Any:
        name, parameter = next(self.operations)
        return name, (lambda bins, height, width: torch.full((bins,), parameter), False)

    def _apply_image_or_video_transform(self, image: Tensor, name: str, magnitude: float, **_: object) -> Tensor:
        return by_torchvision_on_floats(image, name, magnitude)

    def _sample_dirichlet(self, params: Tensor) -> Tensor:
        return next(self.shares)


class ScriptedTrivialAugment(Scripted, v2.TrivialAugmentWide):
    pass


class ScriptedRandAugment(Scripted, v2.RandAugment):
    pass


class ScriptedAugMix(Scripted, v2.AugMix):
    pass


def scripted(policy: Any) -> Any:
    match policy:
        case AugMix(severity=severity, width=width, depth=depth, alpha=alpha):
            return ScriptedAugMix(severity, width, depth, alpha)
        case RandAugment(operations=operations, magnitude=magnitude):
            return ScriptedRandAugment(operations, magnitude)
    return ScriptedTrivialAugment()


def as_torchvision_says(code: int, parameter: float) -> tuple[str, float]:
    """The magnitude from which torchvision makes this parameter."""
    name = OPERATIONS[code]
    match name:
        case "brightness" | "color" | "contrast" | "sharpness":
            return THEIRS[name], parameter - 1
        case "posterize":
            return THEIRS[name], 8 - np.log2(parameter)
    return THEIRS[name], parameter


@pytest.mark.parametrize(
    "policy",
    [
        TrivialAugment(),
        RandAugment(),
        RandAugment(operations=3, magnitude=20),
        AugMix(depth=2),
        AugMix(depth=3, width=2),
    ],
    ids=lambda policy: policy.policy,
)
def test_policies_are_torchvisions_at_equal_draws(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stages, shares = [], []

    def recorded(real: Callable[..., Any], into: list[Any]) -> Callable[..., Any]:
        return lambda *arguments: into.append(real(*arguments)) or into[-1]  # type: ignore[func-returns-value]

    monkeypatch.setattr(policies._Space, "draw", recorded(policies._Space.draw, stages))
    monkeypatch.setattr(Draws, "of", recorded(Draws.of, shares))
    images, count = photos(24), 24
    result = policy_of(policy, 32, CPU)(images.clone(), Draws(count, generator()))

    theirs, width = scripted(policy), getattr(policy, "width", 1)
    for i in range(count):
        chains = range(i * width, (i + 1) * width)
        drawn = [(stage[0][chain].item(), stage[1][chain].item()) for chain in chains for stage in stages]
        theirs.operations = iter([as_torchvision_says(*pair) for pair in drawn])
        if shares:
            own = shares[1][i]
            theirs.shares = iter([torch.stack([own, 1 - own])[None], shares[0][i].softmax(0)[None]])
        difference = (result[i] - theirs(images[i])).abs()
        # After another operation a pixel may lie between two levels, and equalize spreads levels.
        assert (difference > 1e-3).float().mean() < 2e-3, drawn
        assert difference.max() < 0.1, drawn


@pytest.mark.parametrize("size", [8, 16, 24])
def test_trivialaugment_moves_no_small_image_out_of_sight(size: int) -> None:
    images = torch.rand(3000, 3, size, size, generator=generator()) * 0.8 + 0.2
    result = policy_of(TrivialAugment(), size, CPU)(images, Draws(3000, generator()))
    assert result.flatten(1).amax(1).min() > 0


@each_policy
def test_what_a_gpu_computes_is_what_a_cpu_does(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images, made = photos(40), policy_of(policy, 32, CPU)
    on_cpu = made(images.clone(), Draws(40, generator()))
    monkeypatch.setattr(policies, "_to_chosen", policies._to_all)
    with NoSynchronisation():
        on_gpu = made(images, Draws(40, generator()))
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=1e-6)
    assert torch.equal(images, photos(40)), "unlike a CPU's way, it writes to no image"


@each_policy
@sizes
def test_policies_keep_colours_and_the_generator_decides_every_bit(policy: Any, size: int) -> None:
    images, made = photos(200, size), policy_of(policy, size, CPU)
    state = generator()
    first, second = (made(images.clone(), Draws(200, state)) for _ in range(2))
    assert torch.equal(first, made(images.clone(), Draws(200, generator())))
    assert not torch.equal(first, second)
    assert first.shape == images.shape and first.isfinite().all()
    assert first.amin() >= -1e-6 and first.amax() <= 1 + 1e-6


@each_policy
def test_each_image_of_a_batch_gets_its_own_draws(policy: Any) -> None:
    result = policy_of(policy, 32, CPU)(photos(1).repeat(64, 1, 1, 1), Draws(64, generator()))
    # Of RandAugment's 14 operations at one magnitude, 9 have two directions: 23 images.
    assert len(result.flatten(1).unique(dim=0)) > 10


def drawn(policy: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Of each stage, the operations and parameters that `count` images get."""
    stages: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(policies, "operate", lambda images, *pair: stages.append(pair) or images)  # type: ignore[func-returns-value]
    policy_of(policy, 8, CPU)(torch.zeros(count, 3, 8, 8), Draws(count, generator()))
    return stages


@pytest.mark.parametrize(
    ("policy", "bins"),
    [(TrivialAugment(), slice(None)), (RandAugment(magnitude=7), slice(7, 8)), (AugMix(severity=4, depth=1), slice(4))],
)
def test_operations_magnitudes_and_directions_are_equally_likely(
    policy: Any, bins: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(codes: Tensor, parameters: Tensor) -> Counter[tuple[int, float]]:
        return Counter(zip(codes.tolist(), parameters.tolist(), strict=True))

    magnitudes, _ = SPACES[policy.policy]
    space = policies._Space(magnitudes, bins, 8, CPU)
    expected, seen = counted(space._codes, space._parameters), counted(*drawn(policy, 30_000, monkeypatch)[0])
    scale = seen.total() / expected.total()
    assert seen.keys() == expected.keys()
    assert {OPERATIONS[code] for code, _ in seen} == set(magnitudes.operations)
    assert stats.chisquare([seen[pair] for pair in expected], [n * scale for n in expected.values()]).pvalue > 0.01


def test_augmix_chains_are_one_to_three_operations_long(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = torch.stack([codes for codes, _ in drawn(AugMix(), 1000, monkeypatch)]).ne(0).sum(0)
    assert stats.chisquare(np.bincount(lengths)[1:]).pvalue > 0.01 and set(lengths.tolist()) == {1, 2, 3}


def test_without_a_policy_the_images_stay() -> None:
    images = random_images(20)
    assert torch.equal(colours(images, policy="none"), images / 255)


# The recipe's own operations.


@sizes
def test_rotation_comes_before_perspective_in_one_sampling(size: int) -> None:
    images = (smooth_images(40, size) * 255).byte()
    made = augmenter(images, rotation=20.0, perspective=0.5, perspective_probability=1.0)
    result, _ = made.batch(torch.arange(40), generator())

    state = generator()  # the same draws: flip and crop, then the angle, then the corners
    torch.rand(40, generator=state), torch.randint(1, (2, 40), generator=state)
    degrees = torch.rand(40, generator=state) * 40 - 20
    moves = torch.randint(size // 4 + 1, (40, 4, 2), generator=state)
    result = result * STD.view(3, 1, 1) + MEAN.view(3, 1, 1)
    assert (result.amin((1, 2, 3)) < 1e-5).sum() > 30  # black, not the mean colour, where nothing is seen
    for image, angle, move, warped in zip(images.float() / 255, degrees, moves, result, strict=True):
        rotated = reference.rotate(image, angle.item(), v2.InterpolationMode.BILINEAR)
        inside = reference.rotate(torch.ones(1, size, size), angle.item(), v2.InterpolationMode.BILINEAR)
        seen = (torchvision_perspective(inside, move) > 0.999).expand(3, -1, -1)
        assert seen.any()
        assert (warped - torchvision_perspective(rotated, move))[seen].abs().mean() < 0.01


def test_angles_are_uniform_up_to_the_rotation() -> None:
    ramp = torch.arange(32, dtype=torch.uint8).mul(8).expand(1, 3, 32, 32).contiguous()
    red = colours(ramp, 2000, rotation=40.0)[:, 0]
    degrees = torch.rad2deg(torch.atan2(red[:, 15, 16] - red[:, 17, 16], red[:, 16, 17] - red[:, 16, 15]))
    assert stats.kstest(degrees.numpy(), stats.uniform(-40, 80).cdf).pvalue > 0.01


def test_perspectives_are_distributed_as_torchvisions() -> None:
    scale = 0.6
    # With fill=0 torchvision multiplies border pixels by their coverage twice; with None once.
    white, other = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8), v2.RandomPerspective(scale, p=1.0, fill=None)
    torch.manual_seed(0)
    expected = torch.stack([other(torch.ones(1, 32, 32)) for _ in range(300)])
    result = colours(white, 2000, perspective=scale, perspective_probability=1.0)[:, :1]
    for area in [np.s_[...], np.s_[..., :16, :16], np.s_[..., 16:, :16]]:
        assert_same_distribution(result[area].mean((1, 2, 3)), expected[area].mean((1, 2, 3)))

    moved = colours(white, 2000, perspective=scale, perspective_probability=0.3).amin((1, 2, 3)) < 0.99
    assert stats.binomtest(int(moved.sum()), 2000, 0.3).pvalue > 0.01


def test_colours_change_in_recipe_order_before_normalising() -> None:
    images = random_images(30)
    made = augmenter(images, brightness=0.5, contrast=0.6, saturation=0.7, hue=0.3)
    result, _ = made.batch(torch.arange(30), generator())
    state = generator()  # the same draws: flip and crop, then the four factors
    torch.rand(30, generator=state), torch.randint(1, (2, 30), generator=state)
    expected = images.float() / 255
    for adjust, centre, reach in [
        (reference.adjust_brightness, 1, 0.5),
        (reference.adjust_contrast, 1, 0.6),
        (reference.adjust_saturation, 1, 0.7),
        (reference.adjust_hue, 0, 0.3),
    ]:
        expected = one_by_one(adjust, expected, centre + (torch.rand(30, generator=state) * 2 - 1) * reach)
    expected = reference.normalize(expected, MEAN.tolist(), STD.tolist())
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("step", ["brightness", "contrast", "saturation", "hue"])
def test_jitter_is_distributed_as_torchvisions(step: str) -> None:
    image = torch.full((1, 3, 16, 16), 120, dtype=torch.uint8)
    image[:, 1] = 80
    image[..., 8:] //= 2
    jitter = v2.ColorJitter(**{step: 0.4})
    torch.manual_seed(0)
    expected = torch.stack([jitter(image[0].float() / 255) for _ in range(500)])
    result = colours(image, 2000, **{step: 0.4})
    for channel in range(3):
        assert_same_distribution(result[:, channel, 0, 0], expected[:, channel, 0, 0])
