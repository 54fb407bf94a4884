"""The section `loss`, a class for each; `training/losses.py` computes them."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.sections.section import Fraction, Section, by_default


class Loss(Section):
    """Fields of all losses, which are against soft targets."""

    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    class_weights: Fraction = Field(
        0.0,
        description="power: an image of a class with n training images weighs n^-power, 1 on average over these images; "
        "0: all the same, 1: all classes the same",
    )


class CrossEntropy(Loss):
    """The negative log-likelihood."""

    name: Literal["cross_entropy"] = "cross_entropy"


class Focal(Loss):
    """Cross-entropy in which a class counts (1 - its probability)^gamma: less, the better it is predicted (1708.02002)."""

    name: Literal["focal"] = "focal"
    gamma: float = Field(2.0, ge=0, le=10, description="0: the cross-entropy")


AnyLoss = Annotated[CrossEntropy | Focal, Field(discriminator="name"), by_default(name="cross_entropy")]
