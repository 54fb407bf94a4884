"""`fast`: a whitening layer and three blocks for a training of seconds. The network of the CIFAR-10 speed runs.

After cifar10-airbench (Jordan 2024, arXiv 2404.00498), which descends from hlb-CIFAR10 (Balsam 2023) and Page's ResNet-9.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from pipeline.models.layers import Whitening
from pipeline.sections.model import Fast


class FastNetwork(nn.Module):
    """Whitening, a block for each width, global max-pool, linear; (N, 3, S, S) -> (N, num_classes) logits.

    Logits are divided by the width of the last block: the head starts with weights of deviation 1, and learns fast.
    """

    def __init__(self, recipe: Fast, num_classes: int, image_size: int):
        super().__init__()
        self.whitening = Whitening(recipe.whitening_kernel)
        inputs, side = 6 * recipe.whitening_kernel**2, image_size - recipe.whitening_kernel + 1
        blocks = []
        for width in recipe.widths:
            blocks.append(FastBlock(inputs, width, recipe, halve=side > 1))
            inputs, side = width, max(side // 2, 1)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, num_classes, bias=False)
        with torch.no_grad():
            self.head.weight /= self.head.weight.std()

    def fit_first_layer(self, images: Tensor) -> None:
        """Whiten patches like these images', float32 (N, 3, S, S), normalised."""
        self.whitening.fit(images)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(gelu(self.whitening(x))).amax((2, 3))
        return self.head(x) / self.head.in_features


class FastBlock(nn.Module):
    """Convolution, max-pool, norm, GELU; convolution, norm, GELU; with depth 3 a third, with a shortcut around both."""

    def __init__(self, inputs: int, width: int, recipe: Fast, halve: bool):
        super().__init__()
        self.convolutions = nn.ModuleList(
            [_convolution(inputs if i == 0 else width, width) for i in range(recipe.depth)]
        )
        self.norms = nn.ModuleList([ShiftNorm(width, recipe.norm_momentum) for _ in range(recipe.depth)])
        self.pool = nn.MaxPool2d(2) if halve else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = shortcut = gelu(self.norms[0](self.pool(self.convolutions[0](x))))
        x = gelu(self.norms[1](self.convolutions[1](x)))
        if len(self.convolutions) == 3:
            x = gelu(self.norms[2](self.convolutions[2](x)) + shortcut)
        return x


class ShiftNorm(nn.BatchNorm2d):
    """Batch norm that learns a shift and no scale."""

    def __init__(self, width: int, momentum: float):
        super().__init__(width, momentum=momentum)
        del self.weight
        self.register_buffer("weight", torch.ones(width))


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    """3 x 3; as far as there are inputs, its outputs start as copies of them."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.dirac_(convolution.weight[:inputs])
    return convolution
