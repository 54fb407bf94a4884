"""Shared by the tests of networks."""

from torch import nn


def layers(network: nn.Module, kind: type) -> list:
    """The modules of a class, in the network's order."""
    return [module for module in network.modules() if isinstance(module, kind)]
