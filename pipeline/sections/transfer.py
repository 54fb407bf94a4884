"""The section `transfer`."""

from pydantic import Field

from pipeline.sections.section import Fraction, Section


class Transfer(Section):
    """Which layers learn, and how fast: for networks that start from weights. Layers are counted from the image.

    A layer is what timm takes for one, in networks of our own a convolution or linear layer with its norm; the last one,
    the head, always learns.
    """

    frozen_epochs: int = Field(0, ge=0, le=10_000, description="epochs at the start in which only the head learns")
    frozen_share: Fraction = Field(0.0, description="share of the layers below the head that never learn")
    layer_decay: float = Field(1.0, gt=0, le=1, description="each layer's rate, as a fraction of that of the next one")
    head_multiple: float = Field(1.0, gt=0, le=1000, description="the head's rate, as a multiple of the optimizer's")
