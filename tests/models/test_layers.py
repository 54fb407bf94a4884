"""Layers that several networks share."""

import pytest
import torch
from torch import nn

from pipeline.models.layers import Dropout, Whitening, conv_bn_relu, halved


def images_of_few_colours(count: int = 300, size: int = 12) -> torch.Tensor:
    """Smooth images whose channels are much alike, as photographs: patches are far from white."""
    generator = torch.Generator().manual_seed(0)
    grey = nn.functional.interpolate(torch.randn(count, 1, 5, 5, generator=generator), size, mode="bilinear")
    return grey + 0.3 * torch.randn(count, 3, size, size, generator=generator)


@pytest.mark.parametrize("kernel", [2, 3])
def test_fitted_whitening_decorrelates_its_outputs(kernel: int) -> None:
    images = images_of_few_colours()
    layer = Whitening(kernel)
    nn.init.zeros_(layer.bias)

    def moments() -> torch.Tensor:
        outputs = layer(images).transpose(0, 1).flatten(1)[: 3 * kernel**2]
        return outputs @ outputs.T / outputs.shape[1]

    identity = torch.eye(3 * kernel**2)
    assert (moments() - identity).abs().max() > 0.3, "as drawn"
    layer.fit(images)
    torch.testing.assert_close(moments().detach(), identity, rtol=0, atol=0.01)
    assert torch.equal(layer.weight[3 * kernel**2 :], -layer.weight[: 3 * kernel**2])


def test_whitening_of_constant_images_is_finite() -> None:
    layer = Whitening(2)
    layer.fit(torch.ones(10, 3, 8, 8))
    assert layer.weight.isfinite().all()
    assert layer.weight.abs().max() < 50


def test_whitening_weight_is_saved_but_not_a_parameter() -> None:
    layer = Whitening(2)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_max_pool_before_relu_equals_max_pool_after_it() -> None:
    torch.manual_seed(0)
    layers = conv_bn_relu(3, 8)
    images, weights = torch.randn(4, 3, 16, 16), torch.randn(4, 8, 8, 8)
    results = []
    for order in (halved(layers), [*layers, nn.MaxPool2d(2)]):
        network = nn.Sequential(*order)
        network.zero_grad()
        output = network(images)
        (output * weights).sum().backward()
        results.append([output, *(p.grad.clone() for p in network.parameters() if p.grad is not None)])
    assert len(results[0]) == 4 and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_dropout_zeroes_a_share_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(0)
    layer, ones = Dropout(p), torch.ones(256, 2048, dtype=torch.bfloat16)
    dropped = layer(ones)
    assert dropped.dtype == ones.dtype
    assert (dropped == 0).float().mean().item() == pytest.approx(p, abs=5e-3)
    assert dropped[dropped != 0].unique().tolist() == [pytest.approx(1 / (1 - p), rel=4e-3)]
    assert torch.equal(layer.eval()(ones), ones)


def test_dropout_draws_from_torchs_seed() -> None:
    layer, ones = Dropout(0.5), torch.ones(8, 64)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(layer(ones))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
