"""The training and validation split: exact sizes, stratified, the same for ever."""

import warnings

import numpy as np
import pytest
import sklearn
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedGroupKFold

from pipeline.data.splits import Partition, _Draw, fold, partition, sealed, thinned
from pipeline.errors import UserError


@given(
    counts=st.lists(st.integers(2, 40), min_size=2, max_size=12),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_image_is_on_one_side_and_every_class_on_both(counts: list[int], fraction: float, seed: int) -> None:
    labels = torch.from_numpy(np.random.RandomState(1).permutation(np.repeat(np.arange(len(counts)), counts)))
    total = round(fraction * len(labels))
    if not len(counts) <= total <= len(labels) - len(counts):
        with pytest.raises(UserError, match="validation_fraction"):
            partition(labels, fraction, seed)
        return
    split = partition(labels, fraction, seed)
    assert sorted([*split.train.tolist(), *split.validation.tolist()]) == list(range(len(labels)))
    assert split.train.tolist() == sorted(split.train.tolist())
    assert split.validation.tolist() == sorted(split.validation.tolist())
    assert split.train.dtype == split.validation.dtype == torch.int64
    assert len(split.validation) == total
    shares = labels[split.validation].bincount(minlength=len(counts)).tolist()
    assert all(1 <= share < count for share, count in zip(shares, counts, strict=True))
    quotas = [count * total / len(labels) for count in counts]
    if all(1 <= quota <= count - 1 for quota, count in zip(quotas, counts, strict=True)):
        assert all(abs(share - quota) < 1 for share, quota in zip(shares, quotas, strict=True))


def test_remaining_images_go_to_the_largest_remainders() -> None:
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor([14, 18, 16, 12]))  # 60 images; quotas of 0.25:
    split = partition(labels, 0.25, 0)  # 3.5, 4.5, 4, 3: one more for the first of the two halves
    assert labels[split.validation].bincount().tolist() == [4, 4, 4, 3]
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([13, 14, 13]))  # quotas 3.25, 3.5, 3.25
    assert labels[partition(labels, 0.25, 0).validation].bincount().tolist() == [3, 4, 3]


def test_split_of_cifar10s_sizes_never_changes() -> None:
    labels = torch.arange(50_000) % 10
    split = partition(labels, 0.1, 0)
    assert labels[split.validation].bincount().tolist() == [500] * 10
    assert labels[split.train].bincount().tolist() == [4500] * 10
    assert split.digest == "fadff1b091e927cf147e8684701aca996c80ac6f534e7c742d32f88927cbaeb6"


def test_a_seed_repeats_its_split_and_another_changes_it() -> None:
    labels = torch.arange(1000) % 7
    again, other = partition(labels, 0.1, 3), partition(labels, 0.1, 4)
    assert partition(labels, 0.1, 3).digest == again.digest != other.digest
    assert not torch.equal(again.validation, other.validation)


def test_validation_is_drawn_from_all_over_each_class() -> None:
    labels = torch.arange(2).repeat_interleave(500)
    chosen = partition(labels, 0.2, 0).validation
    assert chosen[:100].float().mean() == pytest.approx(249.5, abs=45)  # a mean of 100 uniform draws, 3 sigma
    assert (chosen[100:] - 500).tolist() != chosen[:100].tolist()


def test_class_with_one_image_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        partition(torch.tensor([0, 0, 0, 0, 1, 3, 3]), 0.3, 0)
    assert caught.value.lines == [
        "data.validation_fraction = 0.3, class 1: has 1 image for it, and needs one on each side; add images of it",
        "data.validation_fraction = 0.3, class 2: has 0 images for it, and needs one on each side; add images of it",
    ]


def test_too_small_a_fraction_is_refused_with_the_limits() -> None:
    with pytest.raises(UserError) as caught:
        partition(torch.arange(30) % 10, 0.1, 0)
    assert caught.value.lines == [
        "data.validation_fraction = 0.1: gives 3 of 30 images, but 10 classes with at least one image on each side "
        "need 10 to 20, from 0.34 on"
    ]


def test_sealed_part_is_stratified_and_disjoint() -> None:
    labels = torch.arange(100) % 5
    usable, test = sealed(labels, 0.2, 9)
    assert labels[test].bincount().tolist() == [4] * 5
    assert set(usable.tolist()) | set(test.tolist()) == set(range(100))
    assert not set(usable.tolist()) & set(test.tolist())


def test_train_fraction_keeps_class_shares_and_validation() -> None:
    labels = torch.arange(3000) % 3
    whole = partition(labels, 0.1, 0)
    third = thinned(whole, labels, 1 / 3, 0)
    assert torch.equal(third.validation, whole.validation)
    assert labels[third.train].bincount().tolist() == [300] * 3
    assert set(third.train.tolist()) < set(whole.train.tolist())
    assert third.train.tolist() == sorted(third.train.tolist())
    assert len({whole.digest, third.digest, thinned(whole, labels, 1 / 3, 1).digest}) == 3
    assert thinned(whole, labels, 1.0, 0) is whole
    with pytest.raises(UserError, match=r"^data.train_fraction = 0.0001: gives 0 of 2700 images"):
        thinned(whole, labels, 1e-4, 0)
    rare = torch.tensor([0] * 9 + [1] * 2)
    with pytest.raises(UserError, match=r"^data.train_fraction = 0.5, class dog: has 1 image for it, and needs one"):
        thinned(partition(rare, 0.2, 0), rare, 0.5, 0, ("cat", "dog"))


@given(
    sizes=st.lists(st.integers(1, 9), min_size=6, max_size=30),
    classes=st.integers(2, 4),
    fraction=st.floats(0.05, 0.45),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=25)
def test_a_group_is_never_on_two_sides(sizes: list[int], classes: int, fraction: float, seed: int) -> None:
    random = np.random.RandomState(seed)
    groups = torch.from_numpy(random.permutation(np.repeat(np.arange(len(sizes)), sizes)))
    labels = torch.from_numpy(np.unique(random.randint(classes, size=len(groups)), return_inverse=True)[1])
    for draw in (
        lambda: partition(labels, fraction, seed, groups),
        lambda: fold(labels, 1, 3, seed, groups),
        lambda: Partition(*sealed(labels, fraction, seed, groups), ""),
    ):
        try:
            split = draw()
        except UserError:  # a class of one group, or too few groups: see the tests below
            continue
        assert not set(groups[split.train].tolist()) & set(groups[split.validation].tolist())
        assert sorted([*split.train.tolist(), *split.validation.tolist()]) == list(range(len(groups)))
        assert len(split.validation) and set(labels[split.train].tolist()) == set(labels.tolist())


def test_groups_are_drawn_as_near_to_the_share_and_the_classes_as_they_can() -> None:
    labels, groups = torch.arange(600) % 3, torch.arange(600) // 6  # 100 groups with two images of each class
    split = partition(labels, 0.3, 0, groups)
    assert labels[split.validation].bincount().tolist() == [60] * 3
    for fraction, each in ((0.05, 10), (0.15, 30), (0.25, 50), (0.12, 24)):
        validation = partition(labels, fraction, 0, groups).validation
        assert labels[validation].bincount().tolist() == [each] * 3
    assert len(partition(labels, 0.002, 0, groups).validation) == 6, "one group at least, and not a half"
    cameras = torch.arange(600) // 120  # five: a tenth can't be had, so one of them
    assert len(partition(labels, 0.1, 0, cameras).validation) == 120


@pytest.mark.parametrize(
    ("large", "small", "num_small", "classes_of_small", "fraction", "share"),
    [(900, 20, 5, 2, 0.1, 0.1), (900, 20, 9, 3, 0.1, 0.09), (900, 20, 9, 3, 0.2, 0.17), (500, 50, 9, 5, 0.1, 0.105)],
)
def test_large_group_with_all_classes_is_not_drawn_for_a_small_share(
    large: int, small: int, num_small: int, classes_of_small: int, fraction: float, share: float
) -> None:
    """One hospital has most of the images; the small ones have some classes each."""
    sizes = [large, *[small] * num_small]
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = (
        torch.cat(
            [torch.arange(large) % 5, *(one + torch.arange(small) % classes_of_small for one in range(num_small))]
        )
        % 5
    )
    validation = partition(labels, fraction, 0, groups).validation
    assert len(validation) / len(labels) == pytest.approx(share, abs=0.005) and 0 not in groups[validation]
    assert len(labels[validation].unique()) == 5


def test_share_counts_before_a_class_that_only_large_groups_have() -> None:
    sizes = [900, 400, *[20] * 9]
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = torch.cat([torch.arange(1300) % 5, *[torch.arange(20) % 4] * 9])
    validation = partition(labels, 0.1, 0, groups).validation
    assert len(validation) / len(labels) == pytest.approx(0.1, abs=0.05) and len(labels[validation].unique()) == 4


def test_classes_are_drawn_evenly_from_groups_of_all_sizes() -> None:
    """Each patient has one class, and from 1 to hundreds of images."""
    random = np.random.RandomState(1)
    sizes = np.maximum(1, random.lognormal(2.5, 1.2, 100)).astype(int)
    groups = torch.from_numpy(np.repeat(np.arange(100), sizes))
    labels = torch.from_numpy(random.randint(0, 3, 100))[groups]
    for fraction in (0.1, 0.15, 0.2):
        validation = partition(labels, fraction, 0, groups).validation
        shares = labels[validation].bincount(minlength=3) / labels.bincount()
        assert shares.tolist() == pytest.approx([fraction] * 3, abs=0.04)


def test_class_of_one_group_always_trains() -> None:
    labels, groups = torch.tensor([0, 1] * 20 + [2] * 5), torch.tensor([*range(40), *[40] * 5])
    for seed in range(5):
        assert 2 not in labels[partition(labels, 0.2, seed, groups).validation]
    with pytest.raises(UserError, match=r"^data.folds = 4, class cow: leaves no group to train on; add groups of it"):
        fold(labels, 0, 4, 0, groups, ["cat", "dog", "cow"])


@pytest.mark.skipif(
    tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 9), reason="the folds are those of scikit-learn 1.9"
)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=6, max_size=40),
    classes=st.integers(2, 9),
    one_class_each=st.booleans(),
    folds=st.integers(2, 6),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40)
def test_folds_of_groups_are_those_of_scikit_learn(
    sizes: list[int], classes: int, one_class_each: bool, folds: int, seed: int
) -> None:
    random = np.random.RandomState(seed)
    groups = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    labels = random.randint(classes, size=len(sizes))[groups] if one_class_each else groups * 7 % 5 % classes
    labels = np.unique(labels, return_inverse=True)[1]
    assume(np.bincount(labels).max() >= folds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        expected = [
            held_out.tolist()
            for _, held_out in StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(
                labels, labels, groups
            )
        ]
    numbers = _Draw(labels, groups, (), "").fold_numbers(folds, seed)
    assert [np.flatnonzero(numbers == one).tolist() for one in range(folds)] == expected


@pytest.mark.parametrize("groups", [None, torch.arange(90) // 3])
def test_each_image_validates_in_one_fold(groups: torch.Tensor | None) -> None:
    labels = torch.arange(90) % 3
    folds = [fold(labels, number, 5, 0, groups) for number in range(5)]
    assert sorted(torch.cat([one.validation for one in folds]).tolist()) == list(range(90))
    assert all(labels[one.validation].bincount().tolist() == [6] * 3 for one in folds)
    assert len({one.digest for one in folds}) == 5
    with pytest.raises(UserError, match=r"^data.folds = 31: takes at least 31 .*there are .*; choose another"):
        fold(labels, 0, 31, 0, groups)
