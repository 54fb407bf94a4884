"""`expert`: blocks of convolutions that are mixed per image by a soft-attention branch.

Stem; blocks, each halving height and width first where its width grows; global average pooling; linear. Mixing
convolutions per image is CondConv (arXiv 1904.04971), with a softmax as in dynamic convolution (arXiv 1912.03458).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from pipeline.models.layers import conv_bn_relu
from pipeline.sections.model import Expert


class ExpertBlock(nn.Module):
    """K convolutions, summed with K weights per image that an expert branch gives; batch norm, ReLU."""

    as_exported = False  # computes what an exported model does, for who counts it

    def __init__(self, inputs: int, outputs: int, branches: int, reduction: int):
        super().__init__()
        hidden = max(inputs // reduction, 4)
        self.expert = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, branches))
        self.num_branches = branches
        self.branches = nn.Conv2d(inputs, branches * outputs, 3, padding=1, bias=False)  # one behind the other
        self.after = nn.Sequential(nn.BatchNorm2d(outputs), nn.ReLU())

    def mixing_weights(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K), rows summing to 1."""
        return self.expert(x.mean((2, 3))).softmax(1)

    def mixed_outputs(self, x: Tensor, weights: Tensor) -> Tensor:
        """The sum of the branches' outputs by weights (N, K); all branches are one convolution."""
        outputs = self.branches(x).unflatten(1, (self.num_branches, -1))
        return torch.einsum("nkchw,nk->nchw", outputs, weights.to(outputs.dtype))

    def mixed_kernels(self, x: Tensor, weights: Tensor) -> Tensor:
        """The same by one kernel per image, in a convolution of N groups: convolution is linear in its kernel."""
        kernels = self.branches.weight.unflatten(0, (self.num_branches, -1))
        mixed = torch.einsum("nk,koiyx->noiyx", weights, kernels)
        grouped = conv2d(x.flatten(0, 1)[None], mixed.flatten(0, 1), padding=1, groups=len(x))
        return grouped.unflatten(1, (len(x), -1))[0]

    def forward(self, x: Tensor) -> Tensor:
        # An exported graph keeps the number of groups, and with it the number of images, that it was traced with.
        is_exported = self.as_exported or torch.compiler.is_exporting()
        mixed = self.mixed_outputs if is_exported else self.mixed_kernels
        return self.after(mixed(x, self.mixing_weights(x)))


class ExpertNetwork(nn.Module):
    """(N, 3, S, S) normalised images -> (N, num_classes) logits."""

    def __init__(self, recipe: Expert, num_classes: int):
        super().__init__()
        inputs = recipe.widths[0]
        layers: list[nn.Module] = conv_bn_relu(3, inputs)
        for width in recipe.widths:
            if width > inputs:
                layers.append(nn.MaxPool2d(2))
            layers.append(ExpertBlock(inputs, width, recipe.branches, recipe.reduction))
            inputs = width
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(recipe.dropout)
        self.classifier = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.features(x).mean((2, 3))))
