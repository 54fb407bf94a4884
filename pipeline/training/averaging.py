"""Averages of weights, evaluated and saved in their place: over the steps of a training, or over several trainings."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.augment import normalise
from pipeline.evaluation.logits import autocast, images_together


class WeightAverage:
    """Exponential moving average of a network's parameters and floating buffers (batch-norm's running statistics).

    Integer buffers are copied. Update t (from 0) keeps min(decay, (1 + t) / (10 + t)) of the average, so that the
    random start is forgotten soon (TensorFlow's ExponentialMovingAverage with num_updates).
    `network` is a copy in eval mode, in the same memory format, that holds the averages.
    """

    def __init__(self, network: nn.Module, decay: float, on_device: bool = False):
        """`decay` in [0, 1); 0 follows the network itself. `on_device` counts updates there, so that one can be replayed."""
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._decay = decay
        self._updates: int | Tensor = torch.zeros((), device=next(network.parameters()).device) if on_device else 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Average in the weights after one more step; nothing waits for the device."""
        floating, others = _tensors(self.network)
        new_floating, new_others = _tensors(network)
        if isinstance(self._updates, Tensor):
            changes = torch._foreach_sub(new_floating, floating)
            torch._foreach_mul_(changes, (9 / (10 + self._updates)).clamp(min=1 - self._decay))
            torch._foreach_add_(floating, changes)
        else:
            decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
            torch._foreach_lerp_(floating, new_floating, 1 - decay)
        if others:
            torch._foreach_copy_(others, new_others)
        self._updates += 1

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs; the tensors are the live ones, as torch's state dicts are."""
        return {"updates": int(self._updates), "network": self.network.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.network.load_state_dict(state["network"])
        if isinstance(self._updates, Tensor):
            self._updates.fill_(state["updates"])
        else:
            self._updates = state["updates"]


def _tensors(network: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The floating parameters and buffers, and all the others, in a fixed order."""
    tensors = [*network.parameters(), *network.buffers()]
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]


def mean_weights(networks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The mean of each floating tensor of networks alike, the first one's others: a state dict."""
    states = [network.state_dict() for network in networks]
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(first.dtype)
        if first.is_floating_point()
        else first
        for name, first in states[0].items()
    }


@torch.no_grad()
def measure_norms(network: nn.Module, images: Tensor, mean: Tensor, std: Tensor, precision: str) -> None:
    """Batch norm's running statistics anew, as those of averaged weights are no average: the mean over batches of images.

    The uint8 images (N, 3, S, S) are not augmented, as those that are predicted, and nothing is dropped out. Each batch has
    images of all classes, which lie one after the other in a folder, and as many as the others. Leaves the network in
    evaluation mode.
    """
    network.eval()
    norms = [module for module in network.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
        norm.train()
    num_batches = math.ceil(len(images) / images_together(images.shape[-1])) if norms else 0
    for first in range(num_batches):
        with autocast(images.device, precision):
            network(normalise(images[first::num_batches], mean, std))
    network.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
