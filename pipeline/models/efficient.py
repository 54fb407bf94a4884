"""`efficient`: under a million parameters and a wide view: dilated, depthwise-separable, residual.

A dilated residual block, then depthwise-separable ones (arXiv 1610.02357) at half the size, then standard ones at a
quarter; global average pooling. The receptive field is 46 pixels.
"""

from torch import Tensor, nn

from pipeline.models.layers import conv_bn_relu
from pipeline.sections.model import Efficient


class Residual(nn.Module):
    """x + body(x), dropout behind the sum's ReLU."""

    def __init__(self, body: list[nn.Module], dropout: float):
        super().__init__()
        self.body = nn.Sequential(*body)
        self.after = nn.Sequential(nn.ReLU(), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x + self.body(x))


class EfficientNetwork(nn.Module):
    """(N, 3, S, S) normalised images -> (N, num_classes) logits."""

    def __init__(self, recipe: Efficient, num_classes: int):
        super().__init__()
        first, middle, last = recipe.widths
        dilated = [
            *conv_bn_relu(first, first, dilation=recipe.dilation),
            *conv_bn_relu(first, first, dilation=recipe.dilation),
        ]
        self.features = nn.Sequential(
            *conv_bn_relu(3, first),
            Residual(dilated[:-1], recipe.dropout),  # without the last ReLU: it stands behind the sum
            nn.MaxPool2d(2),
            *conv_bn_relu(first, middle, kernel=1),
            *(
                Residual(_separable(middle) + _separable(middle)[:-1], recipe.dropout)
                for _ in range(recipe.separable_blocks)
            ),
            nn.MaxPool2d(2),
            *conv_bn_relu(middle, last, kernel=1),
            *(
                Residual((conv_bn_relu(last, last) + conv_bn_relu(last, last))[:-1], recipe.dropout)
                for _ in range(recipe.standard_blocks)
            ),
        )
        self.classifier = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def _separable(width: int) -> list[nn.Module]:
    """A 3x3 convolution of each channel by itself, then 1x1 across channels; batch norm, ReLU."""
    return [nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), *conv_bn_relu(width, width, kernel=1)]
