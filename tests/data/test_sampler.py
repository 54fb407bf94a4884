"""Which images an epoch shows."""

import pytest
import torch
from torch import Tensor

from pipeline.data.sampler import Sampler
from pipeline.sections.data import Data

COUNTS = torch.tensor([500, 100, 7, 0, 3])  # in any order, and a class may have none, as where a forecast times a few
LABELS = torch.arange(5).repeat_interleave(COUNTS)[torch.randperm(610, generator=torch.Generator().manual_seed(3))]


def epoch(power: float | None, seed: int = 0) -> Tensor:
    sampler = {} if power is None else {"sampler": "balanced", "sampler_power": power}
    return Sampler(LABELS, 5, Data(**sampler)).epoch(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("power", [0, 0.3, 1])
def test_each_class_has_its_share_of_an_epoch_and_each_image_of_its_class(power: float) -> None:
    shown = epoch(power)
    assert shown.shape == LABELS.shape
    shares = COUNTS ** (1 - power) * (COUNTS > 0)
    of_classes = LABELS[shown].bincount(minlength=5)
    assert (of_classes - 610 * shares / shares.sum()).abs().max() <= 1
    copies = shown.bincount(minlength=610)
    for label in LABELS.unique():
        of_images = copies[label == LABELS]
        assert of_images.max() - of_images.min() <= 1


def test_power_0_shows_each_image_once() -> None:
    assert epoch(0).sort().values.equal(torch.arange(610))


def test_the_seed_alone_decides_the_order() -> None:
    assert epoch(1).equal(epoch(1))
    assert not epoch(1).sort().values.equal(epoch(1, seed=1).sort().values), "other images of the large class"
    ranks = (LABELS == 0).cumsum(0)[epoch(1).unique()][LABELS[epoch(1).unique()] == 0]
    assert ranks.diff().max() > 5, "drawn at random, not every second or third"
    batches = LABELS[epoch(1)].split(100)[:6]
    assert all(20 < int((batch == 4).sum()) < 32 for batch in batches), "classes are mixed over the epoch"


def test_uniform_is_a_permutation_by_the_next_random_number() -> None:
    assert epoch(None).equal(torch.randperm(610, generator=torch.Generator().manual_seed(0)))
