"""`plain` is the network that its project describes."""

from torch import nn

from pipeline.models.build import build_network
from pipeline.sections.model import Plain


def test_plain_has_four_blocks_and_no_global_pooling() -> None:
    network = build_network(Plain(), 10, 32, seed=0)
    kinds = [type(layer).__name__ for layer in network.features if not isinstance(layer, nn.Dropout2d)]
    block = ["Conv2d", "BatchNorm2d", "ReLU"]
    assert kinds == block + 3 * ["Conv2d", "BatchNorm2d", "MaxPool2d", "ReLU"]
    assert network.classifier.in_features == 256 * 4 * 4
    assert network.dropout.p == 0.1
