"""`baseline` is the reference network that its project describes."""

from torch import nn

from pipeline.models.build import build_network
from pipeline.sections.model import Baseline


def test_baseline_has_a_convolution_per_width_and_a_hidden_layer() -> None:
    network = build_network(Baseline(), 10, 32, seed=0)
    assert [type(layer).__name__ for layer in network.features] == 2 * ["Conv2d", "MaxPool2d", "ReLU"]
    assert [layer.out_channels for layer in network.features if isinstance(layer, nn.Conv2d)] == [16, 32]
    linear = [layer for layer in network.head if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(32 * 8 * 8, 64), (64, 10)]
