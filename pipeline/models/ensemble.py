"""Several networks as one: the mean of their probabilities."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """(N, 3, S, S) float in [0, 1] -> (N, C), the logarithm of the mean of its members' probabilities.

    Softmax of that is the mean, so it is used as logits are. Each member normalises the images for itself.
    """

    temperatures: Tensor
    means: Tensor
    stds: Tensor

    def __init__(
        self,
        networks: Sequence[nn.Module],
        temperatures: Sequence[float],
        means: Sequence[Sequence[float]],
        stds: Sequence[Sequence[float]],
    ):
        """Of each member its network, by what its logits are divided, and the (3,) pixel statistics that it expects."""
        super().__init__()
        self.members = nn.ModuleList(networks)
        for name, values in {"temperatures": temperatures, "means": means, "stds": stds}.items():
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        each = zip(
            self.members, self.temperatures, self.means[..., None, None], self.stds[..., None, None], strict=True
        )
        logits = [network((images - mean) / std).float() / temperature for network, temperature, mean, std in each]
        return torch.stack([one.log_softmax(1) for one in logits]).logsumexp(0) - math.log(len(logits))
