"""The one loop that trains."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score
from torch.nn.functional import cross_entropy

from pipeline.data.augment import normalise
from pipeline.data.datasets import load
from pipeline.data.prepare import TrainingData, prepare
from pipeline.evaluation.logits import predict_logits
from pipeline.models.build import build_network
from pipeline.models.fast import FastNetwork
from pipeline.recipe import Recipe
from pipeline.sections.data import Data
from pipeline.training import loop
from pipeline.training.checkpoints import save_weights
from pipeline.training.loop import Diverged, EpochReport, train

CPU = torch.device("cpu")


def weights(network: torch.nn.Module) -> list[torch.Tensor]:
    return list(network.state_dict().values())


def test_equal_recipes_give_equal_weights_bit_for_bit(small_recipe: Recipe, digits: TrainingData) -> None:
    first, second = train(small_recipe, digits, CPU), train(small_recipe, digits, CPU)
    assert first.plain
    assert second.plain
    for one, two in ((first.network, second.network), (first.plain, second.plain)):
        assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))
    other = train(small_recipe.changed({"training.seed": 1}), digits, CPU)
    assert not all(torch.equal(a, b) for a, b in zip(weights(first.network), weights(other.network), strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"training.batch_size": 100, "data.sampler": "balanced"},
        {"augmentation.crop_mode": "reflect", "augmentation.horizontal_flip": "alternating"},
        {"augmentation.crop_padding": 0, "data.geometry": "random_resized_crop", "data.crop_scale": 0.3},
    ],
)
def test_images_in_files_train_the_same_bit_for_bit(
    change: dict[str, object], small_recipe: Recipe, from_files: Callable[[TrainingData], TrainingData]
) -> None:
    recipe = small_recipe.changed({"training.epochs": 1} | change)
    data = prepare(load(recipe.data, Path("data")), recipe.data, CPU)
    in_memory, streamed = (train(recipe, images, CPU) for images in (data, from_files(data)))
    assert all(torch.equal(a, b) for a, b in zip(weights(in_memory.network), weights(streamed.network), strict=True))
    assert torch.equal(in_memory.validation_logits, streamed.validation_logits)
    assert [report.metrics["train/loss"] for report in in_memory.history] == [
        report.metrics["train/loss"] for report in streamed.history
    ]


def test_rare_classes_are_trained_otherwise(small_recipe: Recipe, digits: TrainingData) -> None:
    recipe = small_recipe.changed({"training.epochs": 1})
    keep = (digits.train.labels > 0) | (torch.arange(len(digits.train.labels)) % 10 == 0)  # few noughts
    few = replace(digits, train=digits.train.at(keep.nonzero().view(-1)[:256]))
    plain = train(recipe, few, CPU)
    for changes in ({"data.sampler": "balanced"}, {"loss.class_weights": 1.0}, {"loss.name": "focal"}):
        other = train(recipe.changed(changes), few, CPU)
        assert not torch.equal(plain.validation_logits, other.validation_logits), changes


def test_training_leaves_the_global_random_state_alone(small_recipe: Recipe, digits: TrainingData) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(small_recipe, digits, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)  # and what others drew before doesn't reach into it
    first = train(small_recipe, digits, CPU)
    second = train(small_recipe, digits, CPU)
    assert torch.equal(first.validation_logits, second.validation_logits)


def test_it_learns_digits(small_recipe: Recipe, digits: TrainingData) -> None:
    recipe = small_recipe.changed({"training.epochs": 6, "augmentation.mixup": 0, "augmentation.cutmix": 0})
    history = train(recipe, digits, CPU).history
    assert history[-1].metrics["val/accuracy"] > 0.7, [report.metrics["val/accuracy"] for report in history]
    assert history[-1].metrics["train/loss"] < history[0].metrics["train/loss"]


def test_each_epoch_is_reported_with_all_metrics(small_recipe: Recipe, digits: TrainingData) -> None:
    seen: list[EpochReport] = []
    result = train(small_recipe, digits, CPU, seen.append)
    assert [report.epoch for report in seen] == [1, 2]
    assert result.history == [seen[0].without_classes(), seen[1]], (
        "a thousand classes of each epoch are too many to keep"
    )
    assert seen[0].metrics.keys() - result.history[0].metrics.keys() == {f"val/f1/{name}" for name in digits.classes}
    assert set(seen[0].metrics) == {
        "train/loss",
        "train/accuracy",
        "val/loss",
        "val/accuracy",
        "val/balanced_accuracy",
        "val/f1_macro",
        *(f"val/f1/{name}" for name in digits.classes),
        "optimizer/lr",
        "time/epoch_s",
        "throughput/images_per_s",
        "memory/peak_gib",
    }
    assert all(math.isfinite(value) for report in seen for value in report.metrics.values())


def test_logged_rate_is_the_mean_of_the_epochs_steps(small_recipe: Recipe, digits: TrainingData) -> None:
    """Those of the last step alone would be 0 at the end of most schedules."""
    recipe = small_recipe.changed({"schedule.name": "linear", "schedule.final_fraction": 0, "training.epochs": 2})
    steps = len(digits.train.images) // recipe.training.batch_size
    rates = [recipe.optimizer.lr * (1 - step / (2 * steps - 1)) for step in range(2 * steps)]
    logged = [report.metrics["optimizer/lr"] for report in train(recipe, digits, CPU).history]
    assert logged == pytest.approx([statistics.fmean(rates[:steps]), statistics.fmean(rates[steps:])])


def test_peak_of_memory_is_that_of_this_training(small_recipe: Recipe, digits: TrainingData) -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the system doesn't let a process forget its peak")

    def peak(gib_in_steps: float = 0) -> float:
        recipe = small_recipe.changed({"training.epochs": 1})
        result = train(recipe, digits, CPU, on_step=lambda *_: torch.ones(int(gib_in_steps * 2**28)).sum().item())
        return result.history[-1].metrics["memory/peak_gib"]

    alone, large, again = peak(), peak(0.5), peak()
    assert large > alone + 0.4
    assert again < alone + 0.2, "an earlier one's is not inherited, nor what malloc has kept of it"


def test_throughput_is_of_the_steps_alone(
    small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*arguments: Any) -> torch.Tensor:
        time.sleep(1)
        return predict_logits(*arguments)

    monkeypatch.setattr(loop, "predict_logits", slow)
    batch = small_recipe.training.batch_size
    (metrics,) = (report.metrics for report in train(small_recipe.changed({"training.epochs": 1}), digits, CPU).history)
    training_s = len(digits.train.images) // batch * batch / metrics["throughput/images_per_s"]
    assert 0 < training_s < metrics["time/epoch_s"] - 1


def test_reported_scores_are_those_of_the_returned_network(small_recipe: Recipe, digits: TrainingData) -> None:
    result = train(small_recipe.changed({"training.precision": "fp32"}), digits, CPU)
    pixels = digits.validation.images.float() / 255
    with torch.no_grad():
        logits = result.network((pixels - digits.mean[:, None, None]) / digits.std[:, None, None])
    torch.testing.assert_close(result.validation_logits, logits, atol=1e-4, rtol=1e-4)
    labels, predicted, metrics = (
        digits.validation.labels,
        result.validation_logits.argmax(1),
        result.history[-1].metrics,
    )
    f1 = f1_score(labels, predicted, average=None, zero_division=0)
    assert [metrics[f"val/f1/{name}"] for name in digits.classes] == pytest.approx(f1.tolist())
    assert metrics["val/balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert metrics["val/loss"] == pytest.approx(cross_entropy(logits, digits.validation.labels).item(), abs=1e-4)
    assert metrics["val/accuracy"] == pytest.approx(
        (logits.argmax(1) == digits.validation.labels).double().mean().item()
    )


def test_averaged_weights_are_what_is_judged(small_recipe: Recipe, digits: TrainingData) -> None:
    averaged = train(small_recipe, digits, CPU)
    plain = train(small_recipe.changed({"training.ema_decay": 0}), digits, CPU)
    assert plain.plain is None
    assert averaged.plain
    assert all(torch.equal(a, b) for a, b in zip(weights(averaged.plain), weights(plain.network), strict=True)), (
        "averaging must not change the training"
    )
    assert not torch.equal(averaged.validation_logits, plain.validation_logits)


def test_a_training_that_diverges_ends_at_once(small_recipe: Recipe, digits: TrainingData) -> None:
    steps = []
    recipe = small_recipe.changed(
        {"optimizer.lr": 99, "optimizer.weight_decay": 9, "training.clip_norm": 0, "training.epochs": 50}
    )
    with pytest.raises(Diverged, match=r"loss is (nan|inf) in epoch \d+, step \d+"):
        train(recipe, digits, CPU, on_step=lambda epoch, step, total: steps.append(step))
    assert 0 < len(steps) < 50 * 20


def test_on_epoch_ends_the_training_by_raising(small_recipe: Recipe, digits: TrainingData) -> None:
    def stop(report: EpochReport) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        train(small_recipe, digits, CPU, stop)


def test_steps_are_counted_and_a_large_batch_is_all_data(small_recipe: Recipe, digits: TrainingData) -> None:
    seen: list[tuple[int, int, int]] = []
    train(small_recipe, digits, CPU, on_step=lambda *at: seen.append(at))
    steps = len(digits.train.labels) // 64
    assert seen == [(epoch, i, steps) for epoch in (1, 2) for i in range(1, steps + 1)]
    seen.clear()
    train(small_recipe.changed({"training.batch_size": 60_000}), digits, CPU, on_step=lambda *at: seen.append(at))
    assert seen == [(1, 1, 1), (2, 1, 1)]


MUON = {"optimizer.name": "muon", "optimizer.lr": 0.1, "optimizer.bias_lr": 1, "optimizer.head_lr": 1}
FAST = {
    "model.network": "fast",
    "model.widths": (8, 16),
    "augmentation.horizontal_flip": "alternating",
    **MUON,
    "optimizer.bias_lr": 10,
    "optimizer.head_lr": 100,
    "optimizer.whitening_share": 0.5,
}


def test_fast_repeats_bit_for_bit_and_whitens_by_the_data(small_recipe: Recipe, digits: TrainingData) -> None:
    recipe = small_recipe.changed(FAST)
    first, second = train(recipe, digits, CPU), train(recipe, digits, CPU)
    assert all(torch.equal(a, b) for a, b in zip(weights(first.network), weights(second.network), strict=True))
    assert first.plain
    images = normalise(digits.train.images, digits.mean, digits.std)
    fitted = build_network(recipe.model, 10, 8, seed=recipe.training.seed)
    assert isinstance(fitted, FastNetwork)
    fitted.fit_first_layer(images)
    for trained in (first.network, first.plain):
        assert torch.equal(trained.whitening.weight, fitted.whitening.weight)
    other = train(recipe.changed({"training.seed": 1}), digits, CPU)
    assert torch.equal(other.network.whitening.weight, fitted.whitening.weight)
    assert not torch.equal(other.network.head.weight, first.network.head.weight)


def test_first_layer_of_given_weights_stays_as_it_is(
    small_recipe: Recipe, digits: TrainingData, tmp_path: Path
) -> None:
    """What follows it was trained behind it, maybe on other images."""
    recipe = small_recipe.changed(FAST)
    network = build_network(recipe.model, 10, 8, seed=0)
    save_weights(tmp_path / "weights.safetensors", network, {})
    recipe = recipe.changed({"transfer.weights": str(tmp_path / "weights.safetensors"), "training.epochs": 1})
    assert torch.equal(train(recipe, digits, CPU).network.whitening.weight, network.whitening.weight)


def test_the_speed_runs_recipe_learns_digits(small_recipe: Recipe, digits: TrainingData) -> None:
    plain = {"augmentation.mixup": 0, "augmentation.cutmix": 0, "augmentation.horizontal_flip": 0}
    recipe = small_recipe.changed(FAST | plain | {"training.epochs": 6})
    history = train(recipe, digits, CPU).history
    assert history[-1].metrics["val/accuracy"] > 0.7, [report.metrics["val/accuracy"] for report in history]


@pytest.mark.parametrize(
    "change", [{"training.precision": "bf16"}, {"optimizer.name": "adamw", "optimizer.lr": 1e-3}, MUON]
)
def test_every_precision_and_optimizer_trains(change: dict, small_recipe: Recipe, digits: TrainingData) -> None:
    result = train(small_recipe.changed(change), digits, CPU)
    assert math.isfinite(result.history[-1].metrics["train/loss"])


@pytest.mark.parametrize("policy", ["trivialaugment", "randaugment", "augmix"])
def test_every_policy_trains(policy: str, small_recipe: Recipe, digits: TrainingData) -> None:
    result = train(small_recipe.changed({"augmentation.policy": policy, "training.epochs": 1}), digits, CPU)
    assert math.isfinite(result.history[-1].metrics["train/loss"])


def test_a_consistency_loss_counts_by_its_weight(small_recipe: Recipe, digits: TrainingData) -> None:
    one_step = {"augmentation.policy": "augmix", "training.epochs": 1, "training.batch_size": len(digits.train.labels)}
    losses = [
        train(small_recipe.changed(one_step | {"augmentation.consistency": weight}), digits, CPU).history[0].metrics
        for weight in (5.0, 10.0, 15.0)
    ]
    first, second, third = (metrics["train/loss"] for metrics in losses)
    assert second - first == pytest.approx(third - second, rel=1e-3) and second - first > 1e-3
    assert losses[0]["train/accuracy"] == losses[2]["train/accuracy"] <= 1


def test_a_real_slice_of_cifar10_is_learnt(cifar10_dir, small_recipe: Recipe) -> None:
    from pipeline.data.datasets import Dataset, Split, load
    from pipeline.data.prepare import prepare

    whole = load(Data(dataset="cifar10", image_size=32), cifar10_dir)
    few = Dataset(whole.name, whole.classes, Split(whole.train.images[:1500], whole.train.labels[:1500]), "", "")
    recipe = small_recipe.changed(
        {"data.dataset": "cifar10", "data.image_size": 32, "model.widths": (16, 32), "training.epochs": 3}
        | {"augmentation.mixup": 0, "augmentation.cutmix": 0}
    )
    result = train(recipe, prepare(few, recipe.data, CPU), CPU)
    assert result.history[-1].metrics["val/accuracy"] > 0.2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_step_waits_for_the_gpu(small_recipe: Recipe, tmp_path) -> None:
    """torch raises at any synchronising call inside an epoch's steps."""
    from pipeline.data.datasets import load
    from pipeline.data.prepare import prepare

    gpu = torch.device("cuda")
    data = prepare(load(Data(dataset="digits", image_size=8), tmp_path), small_recipe.data, gpu)
    full = small_recipe.changed(
        {"augmentation.rotation": 15, "augmentation.perspective": 0.2, "augmentation.hue": 0.1}
        | {"augmentation.brightness": 0.2, "augmentation.contrast": 0.2, "augmentation.saturation": 0.2}
        | {"augmentation.erasing": 0.5}
    )
    train(full, data, gpu)  # warm: libraries synchronise when they start

    def guard(epoch: int, step: int, steps: int) -> None:
        torch.cuda.set_sync_debug_mode("default" if step == steps else "error")

    try:
        train(full, data, gpu, on_step=guard)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_deterministic_recipe_repeats_on_a_gpu(small_recipe: Recipe, tmp_path) -> None:
    from pipeline.data.datasets import load
    from pipeline.data.prepare import prepare

    gpu = torch.device("cuda")
    data = prepare(load(Data(dataset="digits", image_size=8), tmp_path), small_recipe.data, gpu)
    recipe = small_recipe.changed({"training.deterministic": True, "augmentation.rotation": 15})
    first, second = train(recipe, data, gpu), train(recipe, data, gpu)
    assert all(torch.equal(a, b) for a, b in zip(weights(first.network), weights(second.network), strict=True))
