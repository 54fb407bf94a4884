"""`efficient` is the network that system 002 describes."""

import pytest
import torch
from network_cases import layers
from torch import nn

from pipeline.models.build import build_network, num_parameters, receptive_field
from pipeline.models.efficient import EfficientNetwork
from pipeline.sections.model import Efficient


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
