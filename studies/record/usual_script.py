"""`baseline` as a person writes it: torchvision's transforms, the published recipe; a peer of time_to_published.py."""

from collections.abc import Iterable

import torch
from torch import nn
from torchvision import transforms  # type: ignore[import-untyped]

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
AUG = {"baseline": [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]}


def baseline() -> nn.Module:
    """The network of pipeline/models/baseline.py."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 8 * 8, 64), nn.ReLU(), nn.Linear(64, 10))


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """As published, the rate and the momentum filled in as in studies/baseline.py."""
    return torch.optim.SGD(parameters, 0.01, momentum=0.9)
