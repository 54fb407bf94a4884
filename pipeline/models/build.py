"""From a recipe's `model` section to a network."""

import torch
from torch import nn

from pipeline.models.attention import AttentionNetwork
from pipeline.recipe import Model


def build_network(model: Model, num_classes: int, seed: int) -> nn.Module:
    """A fresh network on the CPU, (N, 3, S, S) float -> (N, num_classes) logits, its weights drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AttentionNetwork(model, num_classes)


def num_parameters(network: nn.Module) -> int:
    """How many learnt numbers the network has; batch norm's running statistics are none."""
    return sum(p.numel() for p in network.parameters())
