"""The prediction methods against slow references and sets whose answer is known."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from torch.nn import functional

from pipeline.evaluation.scores import score
from pipeline.inference.methods import (
    METHODS,
    Fitted,
    Measured,
    combine,
    fit,
    fit_temperature,
    fit_thresholds,
    measure,
    methods_table,
    out_of_fold,
    stratified_folds,
    verdict,
    views,
    views_of,
)
from pipeline.recipe import parse_recipe

seeds = st.integers(0, 2**32 - 1)


def softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).double().softmax(-1).numpy()


def known(seed: int, images: int, classes: int, factor: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, C), `factor` times the true log-odds of the labels that are drawn from them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(images, classes)) * 2
    chances = softmax(logits).cumsum(axis=1)
    labels = (rng.random((images, 1)) > chances).sum(axis=1).clip(0, classes - 1)
    return logits * factor, labels


def rounded(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, C) with many ties, as half-precision logits have, and labels of some of the classes."""
    rng = np.random.default_rng(seed)
    images, classes = rng.integers(1, 40), rng.integers(2, 6)
    probabilities = softmax(np.round(rng.normal(size=(images, classes)) * 2) / 2)
    return probabilities, rng.integers(rng.integers(1, classes + 1), size=images)


def macro_f1(labels: np.ndarray, scores: np.ndarray) -> float:
    return f1_score(labels, scores.argmax(axis=1), labels=range(scores.shape[1]), average="macro", zero_division=0)


# views


def test_views_are_the_image_its_mirror_and_both_moved_by_whole_pixels() -> None:
    images = torch.randint(256, (5, 3, 9, 9), dtype=torch.uint8)
    itself, mirror, up_left, down_right = views(images, flip=True, shift=2)
    assert torch.equal(itself, images)
    assert torch.equal(mirror, torch.flip(images, dims=(3,)))
    assert torch.equal(up_left[..., :-2, :-2], torch.roll(images, (-2, -2), dims=(2, 3))[..., :-2, :-2])
    assert torch.equal(down_right[..., 2:, 2:], torch.roll(mirror, (2, 2), dims=(2, 3))[..., 2:, 2:])


def test_moved_views_show_a_mirror_at_the_border() -> None:
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    padded = functional.pad(images.float(), (3, 3, 3, 3), mode="reflect").to(torch.uint8)
    _, up_left, down_right = views(images, flip=False, shift=3)
    assert torch.equal(up_left, padded[..., 6:, 6:])
    assert torch.equal(down_right, padded[..., :8, :8])


def test_both_ways_of_moving_are_the_same_upside_down() -> None:
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    _, up_left, _ = views(images, flip=False, shift=1)
    _, _, down_right = views(images.flip(2, 3), flip=False, shift=1)
    assert torch.equal(up_left.flip(2, 3), down_right)


@pytest.mark.parametrize(("flip", "shift", "count"), [(True, 1, 4), (False, 1, 3), (True, 0, 2), (False, 0, 1)])
def test_views_are_distinct_images_of_the_same_kind_the_first_untouched(flip: bool, shift: int, count: int) -> None:
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
def test_views_are_what_training_showed(size: int, crop: int, flip: float | str, expected: tuple[bool, int]) -> None:
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


# temperature


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5])
def test_the_temperature_undoes_a_known_overconfidence(factor: float) -> None:
    assert fit_temperature(*known(0, 20_000, 6, factor)) == pytest.approx(factor, rel=0.03)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_no_temperature_of_a_fine_grid_has_a_lower_loss(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = known(seed, int(rng.integers(2, 60)), 4, rng.uniform(0.1, 10))
    found = fit_temperature(logits.astype(np.float32), labels)

    def loss(temperature: float) -> float:
        return float(functional.cross_entropy(torch.from_numpy(logits / temperature), torch.from_numpy(labels)))

    assert loss(found) <= min(map(loss, np.geomspace(0.05, 20, 400))) + 1e-6


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e4, 1e30])
def test_the_temperature_is_a_number_within_its_bounds_whatever_the_logits(scale: float) -> None:
    logits = np.array([[1, 0, 0], [0, 1, 0.5]], np.float32) * np.float32(scale)
    for labels in ([0, 1], [1, 0], [0, 2]):
        assert 0.05 <= fit_temperature(logits, np.array(labels)) <= 20
        assert 0.05 <= fit_temperature(logits[:1], np.array(labels[:1])) <= 20


def test_the_temperature_stays_at_the_bound_it_is_drawn_to() -> None:
    logits = np.eye(3, dtype=np.float32)
    assert fit_temperature(logits, np.arange(3)) == pytest.approx(0.05, rel=1e-3)  # all right
    assert fit_temperature(logits, np.array([1, 2, 0])) == pytest.approx(20, rel=1e-3)  # all wrong


@given(seeds, st.floats(0.05, 20))
def test_scaling_keeps_every_predicted_class(seed: int, temperature: float) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(1, 50, 4)).astype(np.float32) * 8
    logits[0, :, 1] = np.nextafter(logits[0, :, 0], np.float32(np.inf))  # closer than float32 can divide
    scaled = combine("plain", logits, Fitted(temperature, (1.0,) * 4))
    np.testing.assert_array_equal(scaled.argmax(axis=1), logits[0].argmax(axis=1))


# thresholds


def slow_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Coordinate ascent over the whole grid, a full evaluation per point; the nearest to 1 of the best."""
    grid = sorted((2 ** (step / 8) for step in range(-8, 9)), key=lambda t: (round(abs(np.log(t)), 9), t))
    thresholds = np.ones(probabilities.shape[1])
    for chosen in [*range(len(thresholds))] * 2:
        best = macro_f1(labels, probabilities / thresholds)
        tried = {}
        for candidate in grid:
            thresholds_now = thresholds.copy()
            thresholds_now[chosen] = candidate
            tried[candidate] = macro_f1(labels, probabilities / thresholds_now)
        winner = next(t for t in grid if tried[t] >= max(tried.values()) - 1e-9)
        if tried[winner] > best + 1e-9:
            thresholds[chosen] = winner
    return thresholds


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_thresholds_are_those_of_a_slow_search(seed: int) -> None:
    probabilities, labels = rounded(seed)
    np.testing.assert_allclose(fit_thresholds(probabilities, labels), slow_thresholds(probabilities, labels))


@given(seeds)
def test_thresholds_never_cost_macro_f1_where_they_were_fitted(seed: int) -> None:
    probabilities, labels = rounded(seed)
    thresholds = fit_thresholds(probabilities, labels)
    assert macro_f1(labels, probabilities / thresholds) >= macro_f1(labels, probabilities) - 1e-12
    assert thresholds.min() >= 0.5 and thresholds.max() <= 2


def test_thresholds_stay_1_where_nothing_helps() -> None:
    assert fit_thresholds(np.full((9, 3), 1 / 3), np.repeat([0, 1, 2], 3)).tolist() == [1, 1, 1]
    assert fit_thresholds(softmax(np.eye(4)), np.arange(4)).tolist() == [1, 1, 1, 1]
    assert fit_thresholds(softmax(np.eye(4)), np.array([1, 2, 3, 0])).tolist() == [1, 1, 1, 1]


def judged(logits: np.ndarray, labels: np.ndarray) -> dict[str, Measured]:
    return measure(out_of_fold(logits, labels), labels)


def skewed(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits (1, N, 3) of a network that knows the classes are 10 : 1 : 1; for macro-F1 it is too shy of the rare."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, size=3000, p=[10 / 12, 1 / 12, 1 / 12])
    return (rng.normal(size=(3000, 3)) + 1.5 * np.eye(3)[labels] * 1.5 + np.log([10, 1, 1]))[None], labels


def test_thresholds_help_rare_classes_on_images_they_were_not_fitted_on() -> None:
    measured = judged(*skewed(0))
    plain, specialised = measured["plain"], measured["specialised"]
    assert specialised.f1_macro > plain.f1_macro + 4 * specialised.f1_macro_error
    thresholds = fit(skewed(0)[0][0], skewed(0)[1]).thresholds
    assert thresholds[0] > max(thresholds[1:])


# combining


def test_the_four_methods_by_hand() -> None:
    logits = np.log([[[0.6, 0.4], [0.9, 0.1]], [[0.2, 0.8], [0.7, 0.3]]]) * 3
    fitted = Fitted(3.0, (2.0, 1.0))
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
        np.testing.assert_allclose(combine(method, logits, fitted), rows, err_msg=method)


@given(seeds, st.integers(1, 4))
def test_every_method_gives_probabilities(seed: int, num_views: int) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(num_views, 7, 3)) * rng.uniform(0, 300)).astype(np.float32)
    fitted = Fitted(float(rng.uniform(0.05, 20)), tuple(rng.uniform(0.5, 2, 3).tolist()))
    for method in METHODS:
        found = combine(method, logits, fitted)
        assert found.dtype == np.float64 and found.shape == (7, 3) and found.min() >= 0
        np.testing.assert_allclose(found.sum(axis=1), 1)


def test_without_views_and_thresholds_all_methods_are_plain() -> None:
    logits, _ = known(0, 30, 4)
    plain = combine("plain", logits[None], Fitted(2.0, (1.0,) * 4))
    for method in METHODS:
        np.testing.assert_allclose(combine(method, logits[None], Fitted(2.0, (1.0,) * 4)), plain)


# measuring


def noisy_views(seed: int, images: int = 1000, classes: int = 4, noise: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Logits (4, N, C) whose errors are each view's own, so that their mean is better than one."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=images)
    return 2 * np.eye(classes)[labels] + rng.normal(size=(4, images, classes)) * noise, labels


def test_views_with_errors_of_their_own_help_and_the_gain_is_counted() -> None:
    logits, labels = noisy_views(0)
    measured = judged(logits, labels)
    plain, tta = measured["plain"], measured["tta"]
    first = logits[0].argmax(axis=1) == labels
    assert plain.accuracy == first.mean()
    assert (plain.right, plain.wrong, plain.p, plain.gain, plain.gain_error) == (0, 0, 1.0, 0, 0)
    assert tta.p < 1e-6
    assert tta.gain == pytest.approx(tta.accuracy - plain.accuracy)
    assert tta.right + first.sum() - tta.wrong == pytest.approx(tta.accuracy * 1000)
    paired = np.repeat([1, -1, 0], [tta.right, tta.wrong, 1000 - tta.right - tta.wrong])
    assert tta.gain_error == pytest.approx(paired.std() / np.sqrt(1000))


def test_useless_thresholds_look_good_only_where_they_were_fitted() -> None:
    """The logits are calibrated and the classes alike: no thresholds are better than 1, and all that seems so is chance."""
    seen, unseen = [], []
    for seed in range(30):
        calibrated, labels = known(seed, 300, 4)
        logits = calibrated[None]
        in_sample = combine("specialised", logits, fit(logits[0], labels))
        seen.append(macro_f1(labels, in_sample) - macro_f1(labels, calibrated))
        measured = judged(logits, labels)
        unseen.append(measured["specialised"].f1_macro - measured["plain"].f1_macro)
    assert np.mean(seen) > 0.01
    assert np.mean(unseen) < 0


def test_an_image_is_predicted_by_what_the_others_taught() -> None:
    logits, labels = known(3, 10, 2)
    found = out_of_fold(logits[None], labels, folds=10)
    for row in range(10):
        rest = np.delete(np.arange(10), row)
        for method in METHODS:
            expected = combine(method, logits[None, [row]], fit(logits[rest], labels[rest]))
            np.testing.assert_array_equal(found[method][[row]], expected)


def test_scaling_is_measured_to_calibrate_an_overconfident_network() -> None:
    logits, labels = known(1, 4000, 5, factor=3)
    raw, scaled = score(softmax(logits), labels), judged(logits[None], labels)["plain"]
    assert raw.ece > 0.1
    assert scaled.ece < 0.04
    assert scaled.loss < raw.loss
    assert scaled.accuracy == raw.accuracy
    assert scaled.f1 == tuple(raw.f1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("labels", [[0], [2, 2], [0, 1, 2], [0] * 20 + [1], [0, 1] * 10 + [2] * 3])
def test_few_images_are_measured_too(labels: list[int]) -> None:
    logits = np.random.default_rng(0).normal(size=(2, len(labels), 3)).astype(np.float32)
    measured = judged(logits, np.array(labels))
    assert list(measured) == list(METHODS)
    for its in measured.values():
        assert its.n == len(labels)
        assert np.isfinite([its.accuracy, its.f1_macro, its.ece, its.loss, its.p, its.gain_error, *its.f1]).all()
    assert measured == judged(logits, np.array(labels))


@given(st.lists(st.integers(0, 4), max_size=60), st.integers(2, 7))
def test_folds_are_equally_large_in_all_and_of_each_class(labels: list[int], folds: int) -> None:
    fold = stratified_folds(np.array(labels, dtype=np.int64), folds)
    assert np.ptp(np.bincount(fold, minlength=folds)) <= 1
    for name in set(labels):
        assert np.ptp(np.bincount(fold[np.array(labels) == name], minlength=folds)) <= 1


# telling


def facts(**changed: Any) -> Measured:
    of_plain = {"n": 5000, "accuracy": 0.7, "f1_macro": 0.69, "ece": 0.02, "loss": 0.8, "f1": (0.8, 0.6, 0.67)}
    same = {"right": 0, "wrong": 0, "p": 1.0, "f1_macro_error": 0.0}
    return Measured(**{**of_plain, **same, **changed})


def test_the_table_has_all_first_then_each_class_then_the_differences() -> None:
    table = methods_table({"plain": facts(), "tta": facts(accuracy=0.71, f1_macro=0.7, f1=(0.8, 0.7, 0.6))}, "abc")
    assert table.to_csv(index=False).splitlines() == [
        "class,score,plain,tta,tta - plain",
        "all,accuracy,0.7,0.71,0.01",
        "all,macro-F1,0.69,0.7,0.01",
        "a,F1,0.8,0.8,0.0",
        "b,F1,0.6,0.7,0.1",
        "c,F1,0.67,0.6,-0.07",
    ]
    assert list(methods_table(judged(*noisy_views(0, 20)), "abcd")) == [
        *("class", "score", *METHODS),
        *("tta - plain", "specialised - plain", "adaptive - plain"),
    ]


def test_a_verdict_tells_what_was_gained_and_lost() -> None:
    tta = facts(right=31, wrong=10, p=0.0014, f1_macro=0.694, f1_macro_error=0.0016, f1=(0.812, 0.597, 0.671))
    assert verdict({"plain": facts(), "tta": tta}, "tta", ["cat", "deer", "dog"]) == (
        "tta on the 5,000 validation images: accuracy +0.42 ± 0.13 points (31 put right, 10 put wrong, p = 0.001), "
        "macro-F1 +0.4 ± 0.2; most gained: cat +1.2; most lost: deer -0.3."
    )
    assert verdict({"plain": facts()}, "plain", "abc") == (
        "plain on the 5,000 validation images: accuracy 70.00%, macro-F1 69.00%."
    )


def test_a_verdict_claims_nothing_that_may_be_chance() -> None:
    tta = facts(right=20, wrong=15, p=0.5, f1_macro=0.6898, f1_macro_error=0.0012, f1=(0.83, 0.6, 0.65))
    assert verdict({"plain": facts(), "tta": tta}, "tta", "abc") == (
        "tta on the 5,000 validation images: no difference beyond chance; accuracy +0.10 ± 0.12 points "
        "(20 put right, 15 put wrong, p = 0.500), macro-F1 +0.0 ± 0.1."
    )


def test_a_macro_f1_beyond_chance_counts_where_the_accuracy_is_not() -> None:
    its = facts(right=20, wrong=20, f1_macro=0.71, f1_macro_error=0.004, f1=(0.8, 0.66, 0.67))
    said = verdict({"plain": facts(), "specialised": its}, "specialised", "abc")
    assert "chance" not in said
    assert said.endswith("macro-F1 +2.0 ± 0.4; most gained: b +6.0.")


def test_macro_f1_of_a_few_images_a_class_claims_nothing() -> None:
    its = facts(right=20, wrong=20, f1_macro=0.71, f1_macro_error=0.004, f1=(0.8, 0.66, 0.67), n=29)
    assert "no difference beyond chance" in verdict({"plain": facts(n=29), "specialised": its}, "specialised", "abc")


def test_a_loss_is_no_gain() -> None:
    its = facts(right=1, wrong=60, p=1e-9, f1_macro=0.67, f1_macro_error=0.002, f1=(0.79, 0.6, 0.6))
    said = verdict({"plain": facts(), "tta": its}, "tta", "abc")
    assert "accuracy -1.18 ± 0.16 points" in said and "p < 0.001" in said
    assert "gained" not in said and said.endswith("most lost: c -7.0.")
