"""The training loss: cross-entropy or focal loss, how much an image counts in it, and what a teacher says."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from pipeline.data.sampler import class_counts
from pipeline.sections.loss import CrossEntropy, Focal

LossFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def loss_of(recipe: CrossEntropy | Focal, labels: Tensor, num_classes: int) -> LossFunction:
    """The loss of logits (B, C), targets (B, C) and a teacher's logits (B, C), if there are any; a float32 scalar.

    labels: (N,), of all training images.
    """
    weights = class_weights(labels, num_classes, recipe.class_weights) if recipe.class_weights else None
    gamma = recipe.gamma if isinstance(recipe, Focal) else 0.0

    def of_targets(logits: Tensor, targets: Tensor) -> Tensor:
        if weights is None and not gamma:
            return soft_cross_entropy(logits, targets, recipe.label_smoothing)
        return weighted_focal(logits, targets, recipe.label_smoothing, gamma, weights)

    def loss(logits: Tensor, targets: Tensor, teacher_logits: Tensor | None = None) -> Tensor:
        own = of_targets(logits, targets)
        if teacher_logits is None:
            return own
        taught = distillation(logits, teacher_logits, recipe.temperature)
        return (1 - recipe.teacher_weight) * own + recipe.teacher_weight * taught

    return loss


def distillation(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of both logits (N, C) divided by T, mean over the images (arXiv 1503.02531, section 2).

    The factor keeps the gradient's size, whatever the temperature.
    """
    log_p, log_q = ((each.float() / temperature).log_softmax(1) for each in (logits, teacher_logits))
    return functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


def soft_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Mean cross-entropy of logits (N, C) against class probabilities (N, C), as a float32 scalar.

    Smoothing spreads that share of each target evenly over all C classes (arXiv 1512.00567). Always computed in
    float32: the logarithm of a sum loses too much in bfloat16.
    """
    return functional.cross_entropy(logits.float(), targets.float(), label_smoothing=label_smoothing)


def weighted_focal(
    logits: Tensor, targets: Tensor, label_smoothing: float, gamma: float, weights: Tensor | None
) -> Tensor:
    """`soft_cross_entropy` in which class c counts (1 - p_c)^gamma in each image (focal loss: Lin et al. 2017, arXiv
    1708.02002, as it is for targets that are a mixture), and an image its target's mean of `weights` (C,).

    torch's own weights would multiply the smoothed targets class by class: a rare class that weighs a hundred times as
    much as a frequent one would become the target of its images. So a weight multiplies the image's loss here; the two
    are equal for targets of one class without smoothing.
    """
    targets = targets.float()
    log_p = logits.float().log_softmax(1)
    smoothed = targets * (1 - label_smoothing) + label_smoothing / targets.shape[1]
    # 1 - p as -expm1(log p): exact near 1. Above 0, where the power has no finite gradient for gamma < 1.
    losses = -(smoothed * (-log_p.expm1()).clamp(min=1e-12).pow(gamma) * log_p).sum(1)
    return (losses if weights is None else losses * (targets * weights).sum(1)).mean()


def consistency_loss(logits: Tensor, views: int) -> Tensor:
    """How much predictions of several views of the same images differ: logits (views * N, C) -> a float32 scalar, nats.

    The Jensen-Shannon divergence between an image's views, averaged over images (AugMix, arXiv 1912.02781); the mean
    prediction is kept above 1e-7, as there.
    """
    log_p = logits.float().unflatten(0, (views, -1)).log_softmax(2)
    p = log_p.exp()
    return (p * (log_p - p.mean(0).clamp(1e-7, 1).log())).sum(2).mean()


def class_weights(labels: Tensor, num_classes: int, power: float) -> Tensor:
    """float32 (C,) of images with these labels (N,): counts^-power, scaled so that their mean over the images is 1."""
    counts = class_counts(labels, num_classes).double()
    weights = counts.clamp(min=1) ** -power
    return (weights * (len(labels) / (counts * weights).sum())).float()
