"""`improved` is the network that its project describes."""

import pytest
from network_cases import layers
from torch import nn

from pipeline.models.build import build_network
from pipeline.sections.model import Improved


def test_improved_has_its_stages_and_its_head() -> None:
    network = build_network(Improved(), 10, 32, seed=0)
    assert [c.out_channels for c in layers(network, nn.Conv2d)] == [32, 32, 64, 64, 128, 128]
    assert [(f.in_features, f.out_features) for f in layers(network, nn.Linear)] == [(2048, 256), (256, 10)]
    assert [d.p for d in layers(network, nn.Dropout)] == [0.5, 0.5]
    assert len(layers(network, nn.MaxPool2d)) == 3
    weight = layers(network, nn.Conv2d)[5].weight
    assert weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02), "Kaiming"
