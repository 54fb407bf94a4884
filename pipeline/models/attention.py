"""`attention`: a residual network whose blocks attend to channels, then to positions (CBAM, arXiv 1807.06521).

conv 3x3 - BN - ReLU; stages of attention residual blocks, each stage after the first halving height and width;
conv 1x1 - BN; global average pooling; dropout; linear. As its project describes it (studies/README.md). Its blocks can
also attend to channels alone (SE, arXiv 1709.01507; ECA, arXiv 1910.03151), or to nothing.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.sections.model import Attention


class ChannelAttention(nn.Module):
    """(N, C, H, W) -> weights (N, C, 1, 1): one small MLP sees the average and the maximum of each channel."""

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        self.mlp = _mlp(channels, reduction)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.stack([x.mean((2, 3)), x.amax((2, 3))])
        return self.mlp(pooled).sum(0).sigmoid()[:, :, None, None]


class SqueezeExcitation(nn.Module):
    """(N, C, H, W) -> weights (N, C, 1, 1): a small MLP sees the average of each channel."""

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        self.mlp = _mlp(channels, reduction)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.mean((2, 3))).sigmoid()[:, :, None, None]


class EfficientChannelAttention(nn.Module):
    """(N, C, H, W) -> weights (N, C, 1, 1): a convolution along the averages of neighbouring channels."""

    def __init__(self, channels: int):
        super().__init__()
        kernel = max(int((math.log2(channels) + 1) / 2) | 1, 3)  # grows with the channels, odd; the paper's rule
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.mean((2, 3))[:, None]).sigmoid()[:, 0, :, None, None]


def _mlp(channels: int, reduction: int) -> nn.Sequential:
    hidden = max(channels // reduction, 1)
    return nn.Sequential(nn.Linear(channels, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, channels, bias=False))


def channel_attention(recipe: Attention, channels: int) -> nn.Module | None:
    """(N, channels, H, W) -> weights (N, channels, 1, 1), of the recipe's kind; None where that weighs no channels."""
    match recipe.attention:
        case "cbam":
            return ChannelAttention(channels, recipe.reduction)
        case "se":
            return SqueezeExcitation(channels, recipe.reduction)
        case "eca":
            return EfficientChannelAttention(channels)
        case "none":
            return None


class SpatialAttention(nn.Module):
    """(N, C, H, W) -> weights (N, 1, H, W): a convolution over the mean and the maximum over the channels of each position."""

    def __init__(self, kernel: int):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return self.conv(pooled).sigmoid()


class StridedPointwise(nn.Conv2d):
    """A 1 x 1 convolution with a stride, without a bias; for few input channels it gets only the pixels that it reads.

    Where there is a stride, oneDNN's gradient for CPUs without AVX-512 (jit_avx2_1x1, torch 2.15, channels_last) writes
    beyond its buffer, and the process can end: seen by valgrind with 3 and 4 input channels, not with 8 and 12.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_channels >= 8:
            return super().forward(x)
        rows, columns = self.stride
        return functional.conv2d(x[:, :, ::rows, ::columns], self.weight)


class AttentionResidualBlock(nn.Module):
    """Two 3x3 convolutions, channel attention, spatial attention as far as the recipe has them, and the shortcut added."""

    def __init__(self, inputs: int, outputs: int, stride: int, recipe: Attention):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.channel = channel_attention(recipe, outputs)
        self.spatial = SpatialAttention(recipe.spatial_kernel) if recipe.attention == "cbam" else None
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(StridedPointwise(inputs, outputs, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        for weights in (self.channel, self.spatial):
            if weights is not None:
                y = y * weights(y)
        return torch.relu(y + self.shortcut(x))


class AttentionNetwork(nn.Module):
    """(N, 3, S, S) normalised images -> (N, num_classes) logits."""

    def __init__(self, recipe: Attention, num_classes: int):
        super().__init__()
        first, last = recipe.widths[0], recipe.widths[-1]
        self.stem = nn.Sequential(nn.Conv2d(3, first, 3, 1, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        blocks, inputs = [], first
        for stage, width in enumerate(recipe.widths):
            for block in range(recipe.blocks_per_stage):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(AttentionResidualBlock(inputs, width, stride, recipe))
                inputs = width
        self.stages = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.Conv2d(last, last, 1, bias=False), nn.BatchNorm2d(last))
        self.dropout = nn.Dropout(recipe.dropout)
        self.classifier = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.stages(self.stem(x))).mean((2, 3))
        return self.classifier(self.dropout(x))
