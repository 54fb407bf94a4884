"""`fast` is the network of the CIFAR-10 speed runs."""

import pytest
import torch
from network_cases import layers
from torch import nn

from pipeline.models.build import build_network
from pipeline.models.fast import FastNetwork
from pipeline.sections.model import Fast


def test_fast_is_the_network_of_the_speed_runs() -> None:
    network = build_network(Fast(), 10, 32, seed=0).eval()
    assert isinstance(network, FastNetwork)
    convolutions = layers(network, nn.Conv2d)
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [
        (24, 64), (64, 64), (64, 256), (256, 256), (256, 256), (256, 256)
    ]  # fmt: skip
    assert all(n.momentum == 0.4 for n in layers(network, nn.BatchNorm2d))
    assert network.head.weight.std().item() == pytest.approx(1)
    x = torch.randn(2, 24, 7, 7)
    copied = nn.functional.conv2d(x, convolutions[0].weight[:24], padding=1)
    torch.testing.assert_close(copied, x)  # filters begin as copies of their inputs
    x = torch.randn(2, 3, 32, 32)
    naive = nn.functional.gelu(nn.functional.conv2d(x, network.whitening.weight, network.whitening.bias))
    for block in network.blocks:
        (first, second), (before, behind) = block.convolutions, block.norms
        naive = nn.functional.gelu(before(nn.functional.max_pool2d(first(naive), 2)))
        naive = nn.functional.gelu(behind(second(naive)))
    assert naive.shape[2:] == (3, 3)
    torch.testing.assert_close(network(x), nn.functional.max_pool2d(naive, 3).flatten(1) @ network.head.weight.T / 256)


def test_third_convolution_has_a_shortcut_around_two() -> None:
    network = build_network(Fast(widths=(4,), depth=3), 10, 16, seed=0).eval()
    assert isinstance(network, FastNetwork)
    block = network.blocks[0]
    nn.init.zeros_(block.convolutions[2].weight)  # so that the shortcut alone is left
    x = torch.randn(2, 24, 15, 15)
    first = nn.functional.gelu(block.norms[0](block.pool(block.convolutions[0](x))))
    torch.testing.assert_close(block(x), nn.functional.gelu(first))
