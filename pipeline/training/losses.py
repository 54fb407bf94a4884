"""The training loss."""

from torch import Tensor
from torch.nn import functional


def soft_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Mean cross-entropy of logits (N, C) against class probabilities (N, C), as a float32 scalar.

    Smoothing spreads that share of each target evenly over all C classes (arXiv 1512.00567). Always computed in
    float32: the logarithm of a sum loses too much in bfloat16.
    """
    return functional.cross_entropy(logits.float(), targets.float(), label_smoothing=label_smoothing)
