"""Layers that don't learn: for the first epochs all but the head, for the whole training those nearest to the image."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.models.build import layer_ids
from pipeline.sections.transfer import Transfer


class Freezing:
    """Sets which parameters of a network learn in an epoch; a function of recipe and epoch, so a resume needs no state.

    Frozen layers keep their weights bit for bit: they get no gradient, so no optimizer touches them, and their batch norm
    is in evaluation mode, so its statistics stay.
    """

    def __init__(self, network: nn.Module, transfer: Transfer):
        layers = layer_ids(network)
        self._head = max(layers.values())
        self._transfer = transfer
        self._parameters = [(p, layers[name]) for name, p in network.named_parameters() if p.requires_grad]
        self._norms = [
            (module, layers[f"{name}.bias"])
            for name, module in network.named_modules()
            if isinstance(module, _BatchNorm) and f"{name}.bias" in layers
        ]

    def start_epoch(self, epoch: int) -> None:
        """For an epoch (from 1), after the network was put into training mode."""
        transfer = self._transfer
        first = self._head if epoch <= transfer.frozen_epochs else round(transfer.frozen_share * self._head)
        for parameter, layer in self._parameters:
            parameter.requires_grad_(layer >= first)
        for norm, layer in self._norms:
            if layer < first:
                norm.eval()
