"""The section `model`, a class for each network; `models/build.py` builds them."""

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from pipeline.sections.section import Fraction, Section
from pipeline.sections.weights import pinned, pinned_file

Width = Annotated[int, Field(ge=1, le=4096)]
# Fields that change the training only: networks that differ in nothing else predict at the same cost.
TRAINING_ONLY = ("dropout", "attention_dropout", "convolution_dropout", "drop_path", "norm_momentum")


class Attention(Section):
    """Residual network with attention in each block, `pipeline/models/attention.py`."""

    network: Literal["attention"] = "attention"
    attention: Literal["cbam", "se", "eca", "none"] = Field(
        "cbam",
        description="to channels and places (cbam), or to channels by a small network (se) or a convolution (eca)",
    )
    widths: tuple[Annotated[int, Field(ge=4, le=1024)], ...] = Field(
        (31, 62, 124, 248), min_length=1, max_length=5, description="channels of each stage"
    )
    blocks_per_stage: int = Field(2, ge=1, le=8)
    reduction: int = Field(16, ge=1, le=64, description="the hidden layer of cbam and se is this much narrower")
    spatial_kernel: Literal[3, 5, 7] = Field(7, description="kernel of cbam's spatial attention, in pixels")
    dropout: float = Field(0.3, ge=0, lt=1, description="before the classifier")

    @property
    def halvings(self) -> int:
        """How often the image is halved."""
        return len(self.widths) - 1


class Cct(Section):
    """Compact convolutional transformer, `pipeline/models/cct.py`; the defaults are the paper's CCT-2/3x2."""

    network: Literal["cct"] = "cct"
    blocks: int = Field(2, ge=1, le=64, description="of the encoder")
    heads: int = Field(2, ge=1, le=64, description="of the self-attention; tokens have heads * head_width channels")
    head_width: int = Field(64, ge=1, le=512, description="channels of each head")
    mlp_ratio: int = Field(
        1, ge=1, le=16, description="the hidden layer of a block is so many times as wide as its tokens"
    )
    convolutions: int = Field(2, ge=1, le=5, description="that make the tokens")
    kernel: Literal[3, 5, 7] = Field(3, description="of these convolutions, in pixels; 7 halves the image once more")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the tokens, and in each block behind its layers")
    attention_dropout: float = Field(0.1, ge=0, lt=1, description="of the weights by which tokens see each other")
    drop_path: float = Field(
        0.1, ge=0, lt=1, description="stochastic depth: probability that the last block is left out"
    )

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_width

    @property
    def stride(self) -> int:
        """Of each convolution, in pixels."""
        return max(self.kernel // 2 - 1, 1)

    @property
    def halvings(self) -> int:
        """How often the image is halved: by a max-pool behind each convolution, and by a stride of 2."""
        return self.convolutions * self.stride


class Baseline(Section):
    """Small, shallow network without batch norm, `pipeline/models/baseline.py`."""

    network: Literal["baseline"] = "baseline"
    widths: tuple[Width, ...] = Field((16, 32), min_length=1, max_length=5, description="channels of each convolution")
    hidden: int = Field(64, ge=1, le=65_536, description="width of the hidden layer")

    @property
    def halvings(self) -> int:
        """How often the image is halved."""
        return len(self.widths)


class Improved(Section):
    """Stages of two convolutions, a hidden layer between dropouts, `pipeline/models/improved.py`."""

    network: Literal["improved"] = "improved"
    widths: tuple[Width, ...] = Field((32, 64, 128), min_length=1, max_length=6, description="channels of each stage")
    hidden: int = Field(256, ge=1, le=65_536, description="width of the hidden layer")
    dropout: float = Field(0.5, ge=0, lt=1, description="before and behind the hidden layer")

    @property
    def halvings(self) -> int:
        """How often the image is halved."""
        return len(self.widths)


class Expert(Section):
    """Blocks of convolutions mixed per image by soft attention, `pipeline/models/expert.py`."""

    network: Literal["expert"] = "expert"
    widths: tuple[Width, ...] = Field(
        (64, 64, 128, 128, 256),
        min_length=1,
        max_length=16,
        description="channels of each block; halved where they grow",
    )
    branches: int = Field(3, ge=1, le=16, description="K, the convolutions of a block")
    reduction: int = Field(4, ge=1, le=64, description="the expert branch's hidden layer is this much narrower")
    dropout: float = Field(0.0, ge=0, lt=1, description="before the classifier")

    @property
    def halvings(self) -> int:
        """How often the image is halved."""
        return sum(after > before for before, after in pairwise(self.widths))


class Efficient(Section):
    """Dilated, depthwise-separable and residual, under a million parameters, `pipeline/models/efficient.py`."""

    network: Literal["efficient"] = "efficient"
    widths: tuple[Width, Width, Width] = Field((48, 96, 192), description="channels of the three stages")
    dilation: int = Field(2, ge=1, le=8, description="of the first stage's convolutions")
    separable_blocks: int = Field(2, ge=1, le=16, description="residual blocks of the second stage")
    standard_blocks: int = Field(1, ge=1, le=16, description="residual blocks of the third stage")
    dropout: float = Field(0.03, ge=0, lt=1, description="behind each residual block")

    @model_validator(mode="after")
    def _gradients_are_finite(self) -> Self:
        width = self.widths[0]
        if self.dilation > 1 and width > 16 and width % 16:
            raise ValueError(
                f"widths.0 = {width}: must be a multiple of 16 where dilation is above 1: else torch's bf16 gradients "
                "of dilated convolutions are not numbers on a CPU (seen in 2.15)"
            )
        return self

    @property
    def halvings(self) -> int:
        """How often the image is halved."""
        return 2


class Plain(Section):
    """Convolution blocks, flatten, linear, `pipeline/models/plain.py`."""

    network: Literal["plain"] = "plain"
    widths: tuple[Width, ...] = Field(
        (32, 64, 128, 256), min_length=1, max_length=6, description="channels of each block"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="before the classifier")
    convolution_dropout: float = Field(0.0, ge=0, lt=1, description="of entire channels, after each block")

    @property
    def halvings(self) -> int:
        """How often the image is halved."""
        return len(self.widths) - 1


class Fast(Section):
    """A whitening layer and blocks for short trainings (speed-run lineage), `pipeline/models/fast.py`."""

    network: Literal["fast"] = "fast"
    whitening_kernel: int = Field(2, ge=2, le=4, description="side of the patches that the first layer whitens, pixels")
    widths: tuple[Width, ...] = Field((64, 256, 256), min_length=1, max_length=6, description="channels of each block")
    depth: Literal[2, 3] = Field(2, description="convolutions of a block; the third has a shortcut around it")
    norm_momentum: Fraction = Field(0.4, description="a batch's share in batch norm's running statistics, as torch's")

    @property
    def halvings(self) -> int:
        """How often the image is halved."""
        return len(self.widths)


class Timm(Section):
    """Any network of timm, with or without weights to start from, `pipeline/models/timm.py`."""

    network: Literal["timm"] = "timm"
    backbone: str = Field(
        "tf_efficientnet_lite0",
        pattern=r"^\w+(\.\w+)?$",  # no path or address, as timm's names of hubs and folders are
        description="timm's name, such as resnet18 or resnet18.a1_in1k",
    )
    weights: Annotated[str, AfterValidator(pinned)] = Field(
        "none",
        description="none; default (timm downloads them); efficientnet-lite0 (from a package, for that backbone); or a "
        "file, .safetensors or .pth, kept with its digest: path#sha256=...",
    )
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth: probability that a block is left out")
    dropout: float = Field(0.0, ge=0, lt=1, description="before the classifier")

    @property
    def weights_file(self) -> tuple[str, str] | None:
        """(path, SHA-256) where the weights are a file of the user's."""
        return pinned_file(self.weights)

    @property
    def halvings(self) -> int:
        """Unknown here: `models.build.check_network` asks the network itself."""
        return 0


Model = Annotated[
    Attention | Baseline | Cct | Efficient | Expert | Fast | Improved | Plain | Timm,
    Field(discriminator="network"),
]
