"""`efficient` is the network that its project describes."""

import copy

import pytest
import torch
from network_cases import layers
from torch import Tensor, nn

from pipeline.evaluation.logits import bf16_supported
from pipeline.models.build import build_network, num_parameters
from pipeline.models.efficient import EfficientNetwork
from pipeline.models.layers import conv_bn_relu
from pipeline.sections.model import Efficient


@pytest.mark.skipif(not bf16_supported(torch.device("cpu")), reason="emulated bf16 has finite gradients at all widths")
@pytest.mark.parametrize("first", [4, 10, 16, 32, 48, 80])
def test_efficient_has_finite_bf16_gradients_at_every_width(first: int) -> None:
    """oneDNN gives NaN for the weights of dilated convolutions in channels_last at other widths, with 32 images or more."""
    network = build_network(Efficient(widths=(first, 16, 16)), 10, 32, seed=0).to(memory_format=torch.channels_last)
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        network(images.contiguous(memory_format=torch.channels_last)).float().logsumexp(1).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_efficient_has_the_described_layers_and_receptive_field() -> None:
    network = build_network(Efficient(), 10, 32, seed=0)
    assert isinstance(network, EfficientNetwork)
    assert num_parameters(network) < 1_000_000
    assert receptive_field(network.features) == 46
    assert [c.dilation for c in layers(network, nn.Conv2d)].count((2, 2)) == 2
    assert sum(c.groups == c.in_channels > 1 for c in layers(network, nn.Conv2d)) == 4
    assert {d.p for d in layers(network, nn.Dropout)} == {0.03}
    assert [f.in_features for f in layers(network, nn.Linear)] == [192], "global average pooling"


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), 3),
        (nn.Sequential(*conv_bn_relu(3, 4), *conv_bn_relu(4, 4)), 5),
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding=2, dilation=2)), 5),
        (nn.Sequential(*conv_bn_relu(3, 4), nn.MaxPool2d(2), *conv_bn_relu(4, 4)), 8),
        (nn.Sequential(nn.Conv2d(3, 4, 7, 2, 3), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 4, 3, padding=1)), 19),
        (nn.Sequential(*[layer for i in range(5) for layer in conv_bn_relu(3 if i == 0 else 4, 4)]), 11),
    ],
)
def test_receptive_field_of_known_networks(features: nn.Module, expected: int) -> None:
    """By the recurrence r += (kernel - 1) * dilation * jump; the fifth is ResNet's stem and one convolution."""
    assert receptive_field(features) == expected


def receptive_field(features: nn.Module, image_size: int = 128) -> int:
    """Side in pixels of the square that one place of `features`' output depends on; exact where below `image_size`.

    Reads it off the gradient: with positive weights and a positive image nothing cancels, batch norm in evaluation
    mode is a positive scale, and maxima are made averages, which see all of their window.
    """
    network = copy.deepcopy(features).double().eval()
    for parameter in network.parameters():
        nn.init.constant_(parameter, 1 / 64)
    network = _without_maxima(network)
    image = torch.ones(1, 3, image_size, image_size, dtype=torch.float64, requires_grad=True)
    output: Tensor = network(image)
    output[0, :, output.shape[2] // 2, output.shape[3] // 2].sum().backward()
    assert image.grad is not None
    columns = image.grad[0].sum((0, 1)).nonzero().flatten()
    return int(columns[-1] - columns[0]) + 1  # dilated convolutions leave gaps


def _without_maxima(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.MaxPool2d):
            setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride))
        else:
            _without_maxima(child)
    return module
