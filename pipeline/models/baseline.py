"""`baseline`: a small, shallow network to improve on."""

from torch import Tensor, nn

from pipeline.models.layers import flat_size, halved
from pipeline.sections.model import Baseline


class BaselineNetwork(nn.Module):
    """conv-ReLU-maxpool for each width, a hidden layer, linear; (N, 3, S, S) -> (N, num_classes) logits."""

    def __init__(self, recipe: Baseline, num_classes: int, image_size: int):
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for width in recipe.widths:
            layers += halved([nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()])
            inputs = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Linear(flat_size(image_size, len(recipe.widths), inputs), recipe.hidden),
            nn.ReLU(),
            nn.Linear(recipe.hidden, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))
