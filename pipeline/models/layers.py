"""What two or more networks share."""

from torch import nn


def conv_bn_relu(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> list[nn.Module]:
    """A convolution that keeps height and width (at stride 1), batch norm, ReLU."""
    padding = dilation * (kernel // 2)
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


def flat_size(image_size: int, halvings: int, width: int) -> int:
    """How many numbers a network flattens: `width` maps of the image halved so often, rounded down each time."""
    side = image_size >> halvings
    return width * side * side
