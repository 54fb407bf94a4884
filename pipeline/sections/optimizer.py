"""The section `optimizer`, a class for each; `training/optimizers.py` builds them."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.sections.section import Fraction, Section


class Sgd(Section):
    """torch.optim.SGD; `weight_decay` is its L2 coefficient.

    A step shrinks the weights by lr * weight_decay / (1 - momentum), once momentum has built up.
    """

    name: Literal["sgd"] = "sgd"
    lr: float = Field(gt=0, le=100)
    weight_decay: float = Field(5e-4, ge=0, le=10)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class Adaptive(Section):
    """What Adam and AdamW share."""

    lr: float = Field(gt=0, le=100)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)


class Adam(Adaptive):
    """torch.optim.Adam; `weight_decay` is an L2 term in the gradient."""

    name: Literal["adam"] = "adam"
    weight_decay: float = Field(0.0, ge=0, le=10)


class AdamW(Adaptive):
    """torch.optim.AdamW (arXiv 1711.05101); `weight_decay` acts on the weights: a step shrinks them by lr * weight_decay."""

    name: Literal["adamw"] = "adamw"
    weight_decay: float = Field(0.01, ge=0, le=10)


class Muon(Section):
    """Orthogonalised momentum for convolution filters, SGD with Nesterov momentum for everything else.

    After airbench94_muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/). Every rate is of the mean loss and
    follows the schedule. A step first sets the norm of each convolution's weights to the root of its output channels, as
    if batch norm followed every convolution; filters don't decay. Defaults are for batches of about 128 images.
    """

    name: Literal["muon"] = "muon"
    lr: float = Field(gt=0, le=100, description="of the filters: about the length that a step moves each of them")
    momentum: float = Field(0.6, ge=0, lt=1, description="of the filters")
    bias_lr: float = Field(0.1, gt=0, le=1e6, description="of biases, scales and all else with one value a channel")
    head_lr: float = Field(
        0.1, gt=0, le=1e6, description="of linear layers' weights, and of the head's, whatever it is"
    )
    sgd_momentum: float = Field(0.9, ge=0, lt=1, description="of all but the filters")
    weight_decay: float = Field(
        5e-5,
        ge=0,
        le=1,
        description="of all but the filters: their rate * L2 coefficient, whatever the rate; a step shrinks them by "
        "weight_decay / (1 - sgd_momentum), once momentum has built up",
    )
    whitening_share: Fraction = Field(
        1.0, description="of the training, in which a whitening layer's bias learns, the schedule squeezed into it"
    )


Optimizer = Annotated[Sgd | Adam | AdamW | Muon, Field(discriminator="name")]
