"""Layers that two or more networks share."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

EPSILON = 5e-4  # of whitening; the lineage's


def conv_bn_relu(inputs: int, outputs: int, kernel: int = 3, dilation: int = 1) -> list[nn.Module]:
    """A convolution that keeps height and width, batch norm, ReLU."""
    padding = dilation * (kernel // 2)
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


def halved(layers: list[nn.Module]) -> list[nn.Module]:
    """Layers that end with a ReLU, with a max-pool of 2 x 2 put before it: the same numbers as behind it, for less work."""
    assert isinstance(layers[-1], nn.ReLU)
    return [*layers[:-1], nn.MaxPool2d(2), layers[-1]]


class Dropout(nn.Dropout):
    """nn.Dropout for rows of features; on a CPU drawn from uniform numbers, three times as fast as torch's own draw.

    Not for feature maps, whose uniform numbers outgrow the cache (pipeline/benchmarks/README.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not self.training or not self.p:
            return super().forward(x)
        return x * (torch.rand_like(x, dtype=torch.float32) >= self.p) * (1 / (1 - self.p))


def flat_size(image_size: int, halvings: int, width: int) -> int:
    """How many numbers a network flattens: `width` maps of the image halved so often, rounded down each time."""
    side = image_size >> halvings
    return width * side * side


@runtime_checkable
class FitsFirstLayer(Protocol):
    """A network whose first layer is computed from training images instead of learnt."""

    def fit_first_layer(self, images: Tensor) -> None:
        """Called before the first step; images float32 (N, 3, S, S), normalised, on the network's device."""


@runtime_checkable
class HasUndecayed(Protocol):
    """A network of which some parameters are not to shrink."""

    def undecayed(self) -> list[nn.Parameter]:
        """The parameters without weight decay, whatever the optimizer."""


class Whitening(nn.Module):
    """Whitened patches of k x k pixels, and their negatives; (N, 3, S, S) -> (N, 6 k^2, S - k + 1, S - k + 1).

    A convolution whose weights are computed (`fit`) and stay; only its bias learns. Before `fit` they are random. As in
    hlb-CIFAR10 (Balsam 2023) and cifar10-airbench (Jordan 2024, arXiv 2404.00498).
    """

    weight: Tensor

    def __init__(self, kernel: int):
        super().__init__()
        drawn = nn.Conv2d(3, 6 * kernel**2, kernel)
        assert drawn.bias is not None
        self.register_buffer("weight", drawn.weight.detach())
        self.bias = drawn.bias

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """From the patches of images float32 (N, 3, S, S): each output's mean square is 1, no two are correlated.

        Directions in which patches hardly vary are amplified less: EPSILON is added to each variance.
        """
        kernel = self.weight.shape[-1]
        moments = torch.zeros(3 * kernel**2, 3 * kernel**2, device=images.device)
        for chunk in images.split(500):
            patches = functional.unfold(chunk, kernel)  # (n, 3 k^2, places)
            moments += torch.einsum("ncp,ndp->cd", patches, patches) / (len(images) * patches.shape[2])
        variances, directions = torch.linalg.eigh(moments.double().cpu())
        rows = (directions / (variances.clamp_min(0) + EPSILON).sqrt()).T
        self.weight.copy_(torch.cat([rows, -rows]).view_as(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight, self.bias)
