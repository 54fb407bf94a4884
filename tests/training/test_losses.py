"""The training loss, against NumPy in float64 and torch."""

import numpy as np
import pytest
import torch

from pipeline.training.losses import soft_cross_entropy


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
