"""`improved`: stages of two convolutions and a max-pool, and a hidden layer between dropouts."""

from torch import Tensor, nn

from pipeline.models.layers import Dropout, conv_bn_relu, flat_size, halved
from pipeline.sections.model import Improved


class ImprovedNetwork(nn.Module):
    """(conv-BN-ReLU twice, maxpool) for each width, the head; (N, 3, S, S) -> (N, num_classes) logits."""

    def __init__(self, recipe: Improved, num_classes: int, image_size: int):
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for width in recipe.widths:
            layers += [*conv_bn_relu(inputs, width), *halved(conv_bn_relu(width, width))]
            inputs = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            Dropout(recipe.dropout),
            nn.Linear(flat_size(image_size, len(recipe.widths), inputs), recipe.hidden),
            nn.ReLU(),
            Dropout(recipe.dropout),
            nn.Linear(recipe.hidden, num_classes),
        )
        self.apply(_kaiming)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


def _kaiming(module: nn.Module) -> None:
    """Normal with variance 2 / inputs, zero biases (arXiv 1502.01852)."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
