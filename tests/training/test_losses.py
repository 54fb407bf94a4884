"""The training loss, against NumPy in float64 and torch."""

import numpy as np
import pytest
import torch

from pipeline.sections.loss import CrossEntropy, Focal
from pipeline.training.losses import (
    class_weights,
    consistency_loss,
    distillation,
    loss_of,
    soft_cross_entropy,
    weighted_focal,
)

LABELS = torch.tensor([0] * 100 + [1] * 10 + [2] * 4)


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(64, 10, generator=generator) * 3).to(dtype)
    return logits, torch.rand(64, 10, generator=generator).softmax(1)


def by_hand(logits, targets, smoothing):
    """The mean over images of the sum over classes, in float64."""
    z, y = logits.double().numpy(), targets.double().numpy()
    y = y * (1 - smoothing) + smoothing / y.shape[1]
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    return -(y * log_p).sum(axis=1).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_loss_is_the_mean_of_the_sum_over_classes(smoothing):
    logits, targets = batch()
    loss = soft_cross_entropy(logits, targets, smoothing)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(by_hand(logits, targets, smoothing), rel=1e-6)


def test_one_hot_targets_give_the_cross_entropy_of_labels():
    logits, _ = batch()
    labels = torch.arange(64) % 10
    one_hot = torch.nn.functional.one_hot(labels, 10).float()
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(soft_cross_entropy(logits, one_hot, 0.2), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_loss_is_computed_in_float32(dtype, autocast):
    logits, targets = batch(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = soft_cross_entropy(logits, targets.to(dtype), 0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_hand(logits, targets.to(dtype), 0.1), rel=1e-6)


def test_gradient_is_probabilities_minus_smoothed_targets():
    logits, targets = batch()
    logits.requires_grad_()
    soft_cross_entropy(logits, targets, 0.1).backward()
    expected = (logits.softmax(1) - (targets * 0.9 + 0.01)) / 64
    torch.testing.assert_close(logits.grad, expected.detach(), rtol=1e-4, atol=1e-7)


def focal_by_hand(logits, targets, smoothing, gamma):
    """Lin et al. 2017, equation 4, with a softmax: the expected loss of a label drawn from the target; in float64."""
    z, y = logits.double().numpy(), targets.double().numpy()
    y = y * (1 - smoothing) + smoothing / y.shape[1]
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    return sum(
        y[image, label] * -((1 - p[image, label]) ** gamma) * np.log(p[image, label])
        for image in range(len(z))
        for label in range(z.shape[1])
    ) / len(z)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_is_that_of_the_paper(smoothing, gamma):
    logits, mixed = batch()
    one_hot = torch.nn.functional.one_hot(torch.arange(64) % 10, 10)
    for targets in (mixed, one_hot):
        loss = loss_of(Focal(gamma=gamma, label_smoothing=smoothing), LABELS, 10)(logits, targets)
        assert loss.item() == pytest.approx(focal_by_hand(logits, targets, smoothing, gamma), rel=1e-5)


def test_focal_loss_has_finite_gradients_for_certain_predictions():
    logits = torch.tensor([[200.0, 0], [0, 200], [20, 0]], requires_grad=True)
    loss_of(Focal(gamma=0.5), LABELS, 2)(logits, torch.tensor([[1.0, 0]] * 3)).backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert logits.grad[1, 0] < -0.3


def test_defaults_are_the_cross_entropy_bit_for_bit():
    logits, targets = batch()
    loss = loss_of(CrossEntropy(label_smoothing=0.1), LABELS, 10)(logits, targets)
    assert torch.equal(loss, soft_cross_entropy(logits, targets, 0.1))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_class_weights_are_1_on_average_over_images(power):
    weights = class_weights(LABELS, 4, power)  # the last class has no image, as in the few that a forecast times
    assert weights[LABELS].mean().item() == pytest.approx(1)
    assert (weights[1] / weights[0]).item() == pytest.approx(10**power)
    assert weights.isfinite().all()


def test_an_image_weighs_as_its_class_and_keeps_its_target():
    logits, _ = batch()
    logits, labels = logits[:, :3], torch.arange(64) % 3
    one_hot = torch.nn.functional.one_hot(labels, 3).float()
    weights = class_weights(LABELS, 3, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels, weights, reduction="none").mean()
    loss = loss_of(CrossEntropy(class_weights=1), LABELS, 3)
    torch.testing.assert_close(loss(logits, one_hot), expected)
    smooth = [weighted_focal(logits[:1], one_hot[:1], 0.3, 2, weighing) for weighing in (weights, None)]
    torch.testing.assert_close(smooth[0], smooth[1] * weights[0])
    # Smoothed, the best prediction of an image is still its target; by torch's weights it would be the rare class.
    best = (one_hot[:1] * 0.7 + 0.1).log().requires_grad_()
    weighted_focal(best, one_hot[:1], 0.3, 0, weights).backward()
    torch.testing.assert_close(best.grad, torch.zeros(1, 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_hintons(temperature):
    """T^2 times the divergence of the softened predictions, in float64; with T = 1, its gradient is that of soft targets."""
    logits, _ = batch()
    teacher = logits.flip(0) * 2
    z, v = (each.double().numpy() / temperature for each in (logits, teacher))
    p, q = (np.exp(each) / np.exp(each).sum(axis=1, keepdims=True) for each in (z, v))
    expected = temperature**2 * (q * (np.log(q) - np.log(p))).sum(axis=1).mean()
    assert distillation(logits, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)
    assert distillation(logits, logits.bfloat16(), 1).item() < 1e-3

    teach = CrossEntropy(label_smoothing=0.1, temperature=temperature, teacher_weight=0.7)
    targets = teacher.softmax(1)
    loss = loss_of(teach, LABELS, 10)
    own = soft_cross_entropy(logits, targets, 0.1).item()
    assert loss(logits, targets, teacher).item() == pytest.approx(0.3 * own + 0.7 * expected, rel=1e-5)
    assert loss(logits, targets).item() == pytest.approx(own)


def test_consistency_is_the_papers_divergence_between_views():
    """Restated: the mean over three views of KL(view || mean prediction), summed over classes, averaged over images."""
    logits = torch.randn(3 * 20, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    p = np.exp(logits.numpy()).reshape(3, 20, 10)
    p /= p.sum(axis=2, keepdims=True)
    log_mean = np.log(np.clip(p.mean(axis=0), 1e-7, 1))
    expected = sum((view * (np.log(view) - log_mean)).sum() / 20 for view in p) / 3
    for dtype, precision in ((torch.float32, 1e-6), (torch.bfloat16, 0.01)):
        loss = consistency_loss(logits.to(dtype), 3)
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=precision)
    assert consistency_loss(logits[:20].repeat(3, 1), 3).item() == pytest.approx(0, abs=1e-6)
    certain = torch.tensor([[300.0, 0.0]] * 2)  # of the other class a probability that is 0 in float32
    assert consistency_loss(certain, 2).item() == 0
