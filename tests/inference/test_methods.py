"""The prediction methods against slow references and sets whose answer is known."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic_logits import macro_f1, sample_logits, softmax
from torch.nn import functional

from pipeline.evaluation.calibration import Calibration, fit_calibration
from pipeline.evaluation.scores import score
from pipeline.inference.methods import (
    METHODS,
    MethodScores,
    combine,
    compare_with_plain,
    measure,
    methods_table,
    out_of_fold,
    stratified_folds,
    views,
    views_of,
)
from pipeline.recipe import parse_recipe

seeds = st.integers(0, 2**32 - 1)


# views


def test_views_are_image_mirror_and_both_shifted() -> None:
    images = torch.randint(256, (5, 3, 9, 9), dtype=torch.uint8)
    itself, mirror, up_left, down_right = views(images, flip=True, shift=2)
    assert torch.equal(itself, images)
    assert torch.equal(mirror, torch.flip(images, dims=(3,)))
    assert torch.equal(up_left[..., :-2, :-2], torch.roll(images, (-2, -2), dims=(2, 3))[..., :-2, :-2])
    assert torch.equal(down_right[..., 2:, 2:], torch.roll(mirror, (2, 2), dims=(2, 3))[..., 2:, 2:])


def test_shifted_views_reflect_at_the_border() -> None:
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    padded = functional.pad(images.float(), (3, 3, 3, 3), mode="reflect").to(torch.uint8)
    _, up_left, down_right = views(images, flip=False, shift=3)
    assert torch.equal(up_left, padded[..., 6:, 6:])
    assert torch.equal(down_right, padded[..., :8, :8])


def test_both_shifts_are_the_same_upside_down() -> None:
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    _, up_left, _ = views(images, flip=False, shift=1)
    _, _, down_right = views(images.flip(2, 3), flip=False, shift=1)
    assert torch.equal(up_left.flip(2, 3), down_right)


@pytest.mark.parametrize(("flip", "shift", "count"), [(True, 1, 4), (False, 1, 3), (True, 0, 2), (False, 0, 1)])
def test_views_are_distinct_and_the_first_is_the_image(flip: bool, shift: int, count: int) -> None:
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    seen = views(images, flip, shift)
    assert len({view.numpy().tobytes() for view in seen}) == len(seen) == count
    assert {(view.shape, view.dtype) for view in seen} == {(images.shape, torch.uint8)}
    assert torch.equal(seen[0], images)


@pytest.mark.parametrize(
    ("size", "crop", "flip", "expected"),
    [
        (32, 4, 0.5, (True, 1)),
        (32, 0, 0.0, (False, 0)),
        (8, 1, 0.1, (True, 1)),
        (32, 2, "alternating", (True, 1)),
        (64, 4, 0.0, (False, 2)),
        (64, 1, 0.0, (False, 1)),  # it never saw a shift by 2
    ],
)
def test_views_are_only_what_training_showed(
    size: int, crop: int, flip: float | str, expected: tuple[bool, int]
) -> None:
    recipe = parse_recipe(
        {
            "data": {"image_size": size},
            "model": {"network": "baseline"},
            "augmentation": {"crop_padding": crop, "horizontal_flip": flip},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "training": {"epochs": 1},
        }
    )
    assert views_of(recipe) == expected


@given(seeds, st.floats(0.05, 20))
def test_scaling_keeps_every_predicted_class(seed: int, temperature: float) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(1, 50, 4)).astype(np.float32) * 8
    logits[0, :, 1] = np.nextafter(logits[0, :, 0], np.float32(np.inf))  # closer than float32 can divide
    scaled = combine("plain", logits, Calibration(temperature, (1.0,) * 4))
    np.testing.assert_array_equal(scaled.argmax(axis=1), logits[0].argmax(axis=1))


def scores_of(logits: np.ndarray, labels: np.ndarray) -> dict[str, MethodScores]:
    return measure(out_of_fold(logits, labels), labels)


def skewed(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits (1, N, 3) of a network that knows the classes are 10 : 1 : 1; for macro-F1 it is too shy of the rare."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, size=3000, p=[10 / 12, 1 / 12, 1 / 12])
    return (rng.normal(size=(3000, 3)) + 1.5 * np.eye(3)[labels] * 1.5 + np.log([10, 1, 1]))[None], labels


def test_thresholds_help_rare_classes_out_of_fold() -> None:
    measured = scores_of(*skewed(0))
    plain, specialised = measured["plain"], measured["specialised"]
    assert specialised.f1_macro > plain.f1_macro + 4 * specialised.f1_macro_error
    thresholds = fit_calibration(skewed(0)[0][0], skewed(0)[1]).thresholds
    assert thresholds[0] > max(thresholds[1:])


# combining


def test_four_methods_by_hand() -> None:
    logits = np.log([[[0.6, 0.4], [0.9, 0.1]], [[0.2, 0.8], [0.7, 0.3]]]) * 3
    calibration = Calibration(3.0, (2.0, 1.0))
    expected = {
        "plain": [[0.6, 0.4], [0.9, 0.1]],
        "tta": [[0.4, 0.6], [0.8, 0.2]],
        "specialised": [[0.3 / 0.7, 0.4 / 0.7], [0.45 / 0.55, 0.1 / 0.55]],
        "adaptive": [
            [0.6 * 0.4 + 0.4 * 0.2 / 0.8, 0.6 * 0.6 + 0.4 * 0.6 / 0.8],
            [0.9 * 0.8 + 0.1 * 0.4 / 0.6, 0.9 * 0.2 + 0.1 * 0.2 / 0.6],
        ],
    }
    assert set(expected) == set(METHODS)
    for method, rows in expected.items():
        np.testing.assert_allclose(combine(method, logits, calibration), rows, err_msg=method)


@given(seeds, st.integers(1, 4))
def test_every_method_gives_probabilities(seed: int, num_views: int) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(num_views, 7, 3)) * rng.uniform(0, 300)).astype(np.float32)
    calibration = Calibration(float(rng.uniform(0.05, 20)), tuple(rng.uniform(0.5, 2, 3).tolist()))
    for method in METHODS:
        probabilities = combine(method, logits, calibration)
        assert probabilities.dtype == np.float64 and probabilities.shape == (7, 3) and probabilities.min() >= 0
        np.testing.assert_allclose(probabilities.sum(axis=1), 1)


def test_without_views_and_thresholds_all_methods_are_plain() -> None:
    logits, _ = sample_logits(0, 30, 4)
    plain = combine("plain", logits[None], Calibration(2.0, (1.0,) * 4))
    for method in METHODS:
        np.testing.assert_allclose(combine(method, logits[None], Calibration(2.0, (1.0,) * 4)), plain)


# measuring


def noisy_views(seed: int, images: int = 1000, classes: int = 4, noise: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Logits (4, N, C) whose errors are each view's own, so that their mean is better than one."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=images)
    return 2 * np.eye(classes)[labels] + rng.normal(size=(4, images, classes)) * noise, labels


def test_views_with_independent_errors_gain_accuracy() -> None:
    logits, labels = noisy_views(0)
    measured = scores_of(logits, labels)
    plain, tta = measured["plain"], measured["tta"]
    first = logits[0].argmax(axis=1) == labels
    assert plain.accuracy == first.mean()
    assert (plain.gained, plain.lost, plain.p, plain.gain, plain.gain_error) == (0, 0, 1.0, 0, 0)
    assert tta.p < 1e-6
    assert tta.gain == pytest.approx(tta.accuracy - plain.accuracy)
    assert tta.gained + first.sum() - tta.lost == pytest.approx(tta.accuracy * 1000)
    paired = np.repeat([1, -1, 0], [tta.gained, tta.lost, 1000 - tta.gained - tta.lost])
    assert tta.gain_error == pytest.approx(paired.std() / np.sqrt(1000))


def test_useless_thresholds_look_good_only_where_fitted() -> None:
    """The logits are calibrated and the classes alike: no thresholds are better than 1, and all that seems so is chance."""
    seen, unseen = [], []
    for seed in range(30):
        calibrated, labels = sample_logits(seed, 300, 4)
        logits = calibrated[None]
        in_sample = combine("specialised", logits, fit_calibration(logits[0], labels))
        seen.append(macro_f1(labels, in_sample) - macro_f1(labels, calibrated))
        measured = scores_of(logits, labels)
        unseen.append(measured["specialised"].f1_macro - measured["plain"].f1_macro)
    assert np.mean(seen) > 0.01
    assert np.mean(unseen) < 0


def test_each_image_is_predicted_by_the_other_folds() -> None:
    logits, labels = sample_logits(3, 10, 2)
    predicted = out_of_fold(logits[None], labels, folds=10)
    for row in range(10):
        rest = np.delete(np.arange(10), row)
        for method in METHODS:
            expected = combine(method, logits[None, [row]], fit_calibration(logits[rest], labels[rest]))
            np.testing.assert_array_equal(predicted[method][[row]], expected)


def test_scaling_calibrates_an_overconfident_network() -> None:
    logits, labels = sample_logits(1, 4000, 5, factor=3)
    raw, scaled = score(softmax(logits), labels), scores_of(logits[None], labels)["plain"]
    assert raw.ece > 0.1
    assert scaled.ece < 0.04
    assert scaled.loss < raw.loss
    assert scaled.accuracy == raw.accuracy
    assert scaled.f1 == tuple(raw.f1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("labels", [[0], [2, 2], [0, 1, 2], [0] * 20 + [1], [0, 1] * 10 + [2] * 3])
def test_few_images_are_measured_too(labels: list[int]) -> None:
    logits = np.random.default_rng(0).normal(size=(2, len(labels), 3)).astype(np.float32)
    measured = scores_of(logits, np.array(labels))
    assert list(measured) == list(METHODS)
    for m in measured.values():
        assert m.n == len(labels)
        assert np.isfinite([m.accuracy, m.f1_macro, m.ece, m.loss, m.p, m.gain_error, *m.f1]).all()
    assert measured == scores_of(logits, np.array(labels))


@given(st.lists(st.integers(0, 4), max_size=60), st.integers(2, 7))
def test_folds_are_equally_large_in_all_and_by_class(labels: list[int], folds: int) -> None:
    fold = stratified_folds(np.array(labels, dtype=np.int64), folds)
    assert np.ptp(np.bincount(fold, minlength=folds)) <= 1
    for name in set(labels):
        assert np.ptp(np.bincount(fold[np.array(labels) == name], minlength=folds)) <= 1


# sentences


def made_scores(**changed: Any) -> MethodScores:
    of_plain = {"n": 5000, "accuracy": 0.7, "f1_macro": 0.69, "ece": 0.02, "loss": 0.8, "f1": (0.8, 0.6, 0.67)}
    same = {"gained": 0, "lost": 0, "p": 1.0, "f1_macro_error": 0.0}
    return MethodScores(**{**of_plain, **same, **changed})


def test_table_has_all_then_each_class_then_differences() -> None:
    table = methods_table(
        {"plain": made_scores(), "tta": made_scores(accuracy=0.71, f1_macro=0.7, f1=(0.8, 0.7, 0.6))}, "abc"
    )
    assert table.to_csv(index=False).splitlines() == [
        "class,score,plain,tta,tta - plain",
        "all,accuracy,0.7,0.71,0.01",
        "all,macro-F1,0.69,0.7,0.01",
        "a,F1,0.8,0.8,0.0",
        "b,F1,0.6,0.7,0.1",
        "c,F1,0.67,0.6,-0.07",
    ]
    assert list(methods_table(scores_of(*noisy_views(0, 20)), "abcd")) == [
        *("class", "score", *METHODS),
        *("tta - plain", "specialised - plain", "adaptive - plain"),
    ]


def test_sentence_names_gains_and_losses() -> None:
    tta = made_scores(gained=31, lost=10, p=0.0014, f1_macro=0.694, f1_macro_error=0.0016, f1=(0.812, 0.597, 0.671))
    assert compare_with_plain({"plain": made_scores(), "tta": tta}, "tta", ["cat", "deer", "dog"]) == (
        "tta on the 5,000 validation images: accuracy +0.42 ± 0.13 points (31 put right, 10 put wrong, p = 0.001), "
        "macro-F1 +0.4 ± 0.2; most gained: cat +1.2; most lost: deer -0.3."
    )


def test_sentence_claims_nothing_within_chance() -> None:
    tta = made_scores(gained=20, lost=15, p=0.5, f1_macro=0.6898, f1_macro_error=0.0012, f1=(0.83, 0.6, 0.65))
    assert compare_with_plain({"plain": made_scores(), "tta": tta}, "tta", "abc") == (
        "tta on the 5,000 validation images: no difference beyond chance; accuracy +0.10 ± 0.12 points "
        "(20 put right, 15 put wrong, p = 0.500), macro-F1 +0.0 ± 0.1."
    )


def test_macro_f1_beyond_chance_counts_alone() -> None:
    specialised = made_scores(gained=20, lost=20, f1_macro=0.71, f1_macro_error=0.004, f1=(0.8, 0.66, 0.67))
    sentence = compare_with_plain({"plain": made_scores(), "specialised": specialised}, "specialised", "abc")
    assert "chance" not in sentence
    assert sentence.endswith("macro-F1 +2.0 ± 0.4; most gained: b +6.0.")


def test_macro_f1_of_few_images_claims_nothing() -> None:
    specialised = made_scores(gained=20, lost=20, f1_macro=0.71, f1_macro_error=0.004, f1=(0.8, 0.66, 0.67), n=29)
    assert "no difference beyond chance" in compare_with_plain(
        {"plain": made_scores(n=29), "specialised": specialised}, "specialised", "abc"
    )


def test_loss_is_no_gain() -> None:
    tta = made_scores(gained=1, lost=60, p=1e-9, f1_macro=0.67, f1_macro_error=0.002, f1=(0.79, 0.6, 0.6))
    sentence = compare_with_plain({"plain": made_scores(), "tta": tta}, "tta", "abc")
    assert "accuracy -1.18 ± 0.16 points" in sentence and "p < 0.001" in sentence
    assert "gained" not in sentence and sentence.endswith("most lost: c -7.0.")
