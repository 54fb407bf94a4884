"""`plain`: four convolution blocks, flatten, linear; no global pooling."""

from torch import Tensor, nn

from pipeline.models.layers import Dropout, conv_bn_relu, flat_size, halved
from pipeline.sections.model import Plain


class PlainNetwork(nn.Module):
    """conv-BN-ReLU, then conv-BN-ReLU-maxpool for each further width; (N, 3, S, S) -> (N, num_classes) logits."""

    def __init__(self, recipe: Plain, num_classes: int, image_size: int):
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for block, width in enumerate(recipe.widths):
            block_layers = conv_bn_relu(inputs, width)
            # Its author found that a max-pool in the first block harms small images.
            layers += halved(block_layers) if block > 0 else block_layers
            layers.append(nn.Dropout2d(recipe.convolution_dropout))
            inputs = width
        self.features = nn.Sequential(*layers)
        self.dropout = Dropout(recipe.dropout)
        self.classifier = nn.Linear(flat_size(image_size, len(recipe.widths) - 1, inputs), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.features(x).flatten(1)))
