"""The section `transfer`."""

from functools import partial
from typing import Annotated

from pydantic import AfterValidator, Field

from pipeline.sections.section import Fraction, Section
from pipeline.sections.weights import pinned, pinned_file


class Transfer(Section):
    """Which layers learn, and how fast: for networks that start from weights. Layers are counted from the image.

    A layer is what timm takes for one, in networks of our own a convolution or linear layer with its norm (a batch norm
    behind it, a layer norm before it); the last one, the head, always learns.
    """

    frozen_epochs: int = Field(0, ge=0, le=10_000, description="epochs at the start in which only the head learns")
    frozen_share: Fraction = Field(0.0, description="share of the layers below the head that never learn")
    layer_decay: float = Field(1.0, gt=0, le=1, description="each layer's rate, as a fraction of that of the next one")
    head_multiple: float = Field(1.0, gt=0, le=1000, description="the head's rate, as a multiple of the optimizer's")
    weights: Annotated[str, AfterValidator(partial(pinned, names=("none",)))] = Field(
        "none",
        description="none; or a .safetensors file with all tensors of the network, such as a run's weights.safetensors, "
        "kept with its digest: path#sha256=...",
    )

    @property
    def weights_file(self) -> tuple[str, str] | None:
        """(path, SHA-256) of the file that all tensors start from."""
        return pinned_file(self.weights)
