"""`cct`: a compact convolutional transformer (Hassani et al. 2021, arXiv 2104.05704), for small images and few of them.

Convolutions make tokens, to which a learnt position is added; pre-norm encoder blocks; the mean of the tokens, by weights
that a linear layer gives (sequence pooling, in place of a class token); linear. Equal to the authors' code
(github.com/SHI-Labs/Compact-Transformers) with learnt positions.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.layers import Dropout
from pipeline.sections.model import Cct

HIDDEN = 64  # channels between two convolutions of the tokenizer


class StochasticDepth(nn.Module):
    """(N, ...) -> in training each row is zeroed with probability `p` or scaled by 1 / (1 - p) (arXiv 1603.09382)."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        kept = x.new_empty(len(x), *(1,) * (x.ndim - 1), dtype=torch.float32).bernoulli_(1 - self.p)
        return x * (kept / (1 - self.p))  # float32, as the shortcut


class SelfAttention(nn.Module):
    """Every token sees every token, by several heads; (N, T, width) -> (N, T, width)."""

    def __init__(self, recipe: Cct):
        super().__init__()
        self.heads, self.dropout = recipe.heads, recipe.attention_dropout
        self.qkv = nn.Linear(recipe.width, 3 * recipe.width, bias=False)
        self.projection = nn.Linear(recipe.width, recipe.width)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout)
        return self.projection(mixed.transpose(1, 2).flatten(2))


class EncoderBlock(nn.Module):
    """Self-attention and a two-layer MLP, each added to what it got; (N, T, width) -> (N, T, width).

    As in the authors' code, the second norm stands before the branch, so that it normalises the shortcut, too.
    """

    def __init__(self, recipe: Cct, drop_path: float):
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(recipe.width), SelfAttention(recipe), Dropout(recipe.dropout))
        self.norm = nn.LayerNorm(recipe.width)
        hidden = recipe.mlp_ratio * recipe.width
        self.mlp = nn.Sequential(
            nn.Linear(recipe.width, hidden),
            nn.GELU(),
            Dropout(recipe.dropout),
            nn.Linear(hidden, recipe.width),
            Dropout(recipe.dropout),
        )
        self.drop_path = StochasticDepth(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.drop_path(self.attention(x)))
        return x + self.drop_path(self.mlp(x))


class CctNetwork(nn.Module):
    """(N, 3, S, S) normalised images -> (N, num_classes) logits."""

    def __init__(self, recipe: Cct, num_classes: int, image_size: int):
        super().__init__()
        side = -(-image_size // 2**recipe.halvings)  # each halving rounds up
        self.position = nn.Parameter(torch.zeros(1, side**2, recipe.width))
        channels = [3, *[HIDDEN] * (recipe.convolutions - 1), recipe.width]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(channels):
            convolution = nn.Conv2d(inputs, outputs, recipe.kernel, recipe.stride, recipe.kernel // 2, bias=False)
            layers += [convolution, nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        self.tokenizer = nn.Sequential(*layers)
        self.dropout = Dropout(recipe.dropout)
        last = max(recipe.blocks - 1, 1)  # is left out most often; the first one never
        blocks = [EncoderBlock(recipe, recipe.drop_path * block / last) for block in range(recipe.blocks)]
        self.blocks = nn.Sequential(*blocks, nn.LayerNorm(recipe.width))
        self.pooling = nn.Linear(recipe.width, 1)
        self.classifier = nn.Linear(recipe.width, num_classes)
        self.apply(_initialise)
        nn.init.normal_(self.position, std=0.2)

    def undecayed(self) -> list[nn.Parameter]:
        """Positions, biases and norms, as in timm's vision transformers."""
        return [self.position, *(parameter for parameter in self.parameters() if parameter.ndim == 1)]

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokenizer(x).flatten(2).transpose(1, 2)  # (N, T, width)
        tokens = self.blocks(self.dropout(tokens + self.position))
        weights = self.pooling(tokens).softmax(1)  # (N, T, 1), their sum over the tokens is 1
        return self.classifier((weights.transpose(1, 2) @ tokens).squeeze(1))


def _initialise(module: nn.Module) -> None:
    """Kaiming's normal weights for convolutions; small ones and zero biases for linear layers.

    The authors cut normal weights off at 2, which is 10 standard deviations of the positions and 100 of these.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
