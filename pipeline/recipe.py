"""What a run is: an immutable, validated value, JSON both ways, with a digest.

The dotted name of a field (`optimizer.lr`) is also the name of a search parameter and of an MLflow parameter column.
A section that comes in kinds (`model.network`, `augmentation.policy`, `optimizer.name`, `schedule.name`, `loss.name`) has
just the fields of its kind.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from pipeline.errors import NO_SUCH_FIELD, Problem, UserError, did_you_mean, validation_problems

Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """An immutable part of a recipe; unknown fields, NaN and infinity are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class Form(NamedTuple):
    """How an image of any shape becomes the square that a network sees: with the file, all that its pixels depend on."""

    size: int  # height and width, pixels
    geometry: str = "squash"  # or crop (to the centre, by the shorter side), pad (by the longer side, mean colour)
    held: int | None = None  # of training images, which random crops are cut from: squashed to so many pixels


# What a manifest's columns are called; `data.columns` gives others, in this order.
COLUMNS = ("path", "label", "split", "group")


def _columns(value: str) -> str:
    """`label=species,group=patient` or all four names in order, as all four: `path,species,split,patient`."""
    parts = [part.strip() for part in value.split(",")]
    if any("=" in part for part in parts):
        renamed = dict(part.split("=", 1) for part in parts if "=" in part)
        if len(renamed) < len(parts) or not renamed.keys() <= set(COLUMNS):
            raise ValueError(f"should be {', '.join(f'{name}=...' for name in COLUMNS)}, those that differ")
        parts = [renamed.get(name, name).strip() for name in COLUMNS]
    if len(parts) != len(COLUMNS) or not all(parts) or len(set(parts)) < len(parts):
        raise ValueError(f"should name {len(COLUMNS)} different columns, for {', '.join(COLUMNS)}")
    return ",".join(parts)


# What of `data` the form depends on. It may differ between the trials of a study, which share their data set and split.
FORM_FIELDS = ("data.image_size", "data.geometry", "data.crop_scale")
# What of `data` is about the training alone, so that it may differ, too.
SAMPLER_FIELDS = ("data.sampler", "data.sampler_power")


class Data(Section):
    """The data set, what the network sees of its images, and how it is split."""

    dataset: str = Field("cifar10", min_length=1, description="cifar10, digits, a folder or a manifest")
    image_size: int = Field(32, ge=8, le=512, description="height and width in pixels that the network sees")
    geometry: Literal["squash", "crop", "pad", "random_resized_crop"] = Field(
        "squash",
        description="how images become square: squash changes their aspect, crop keeps the centre, pad adds their mean "
        "colour; random_resized_crop cuts training images at random, in place of crop_padding, and crops all others",
    )
    crop_scale: float = Field(
        0.35, ge=0.01, le=1, description="least share of an image's area that random_resized_crop keeps"
    )
    validation_fraction: float = Field(
        0.1, gt=0, lt=0.5, description="share of the training images held out for validation"
    )
    train_fraction: float = Field(1.0, gt=0, le=1, description="share of the other training images that is used")
    split_seed: int = Field(0, ge=0, le=2**32 - 1, description="draws the stratified split, and which images are used")
    folds: int = Field(0, ge=0, le=100, description="so many folds in place of one validation split; 0: none")
    fold: int = Field(0, ge=0, description="which of the folds validates, from 0")
    test_fraction: float = Field(
        0.1,
        ge=0,
        lt=0.5,
        description="share of a folder or manifest without test images that is sealed as its test split",
    )
    columns: Annotated[str, AfterValidator(_columns)] = Field(
        ",".join(COLUMNS), description="of a manifest, for path, label, split and group; or label=species,group=patient"
    )
    sampler: Literal["uniform", "balanced"] = Field(
        "uniform",
        description="what an epoch shows: each training image once, or those of rare classes more often, as many in all",
    )
    sampler_power: Fraction = Field(
        1.0,
        description="how far balanced goes: a class with n images has n^(1 - power) as its share; 1: all the same, 0: "
        "as they are",
    )

    duplicates: Literal["drop", "keep"] = Field(
        "drop", description="images to train on that are in the test split of a folder or manifest, too, byte for byte"
    )
    corrupt: Literal["refuse", "skip"] = Field(
        "refuse", description="files of a folder or manifest that can't be read: skip leaves them out"
    )

    @model_validator(mode="after")
    def _fold_is_one_of_them(self) -> Self:
        if self.folds == 1 or self.fold >= max(self.folds, 1):
            raise ValueError(f"fold {self.fold} of folds {self.folds}: folds is 0 or at least 2, and fold below it")
        return self

    @property
    def column_names(self) -> dict[str, str]:
        """What each of COLUMNS is called in the manifest."""
        return dict(zip(COLUMNS, self.columns.split(","), strict=True))

    @property
    def form(self) -> Form:
        """What is read of each image. The smallest random crop keeps its detail, as far as twice the size reaches."""
        if self.geometry != "random_resized_crop":
            return Form(self.image_size, self.geometry)
        return Form(self.image_size, "crop", math.ceil(self.image_size * min(2.0, self.crop_scale**-0.5)))


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


Width = Annotated[int, Field(ge=1, le=4096)]


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


# Weights that need no file of the user's: none, timm's own download, and those of a package of that name.
NAMED_WEIGHTS = ("none", "default", "efficientnet-lite0")
_PINNED = re.compile(r"(?P<path>.+)#sha256=(?P<sha256>[0-9a-f]{64})")


def file_digest(path: str) -> str:
    """SHA-256 of a file, read once in a process: a space is explored with hundreds of recipes of the same weights."""
    stat = os.stat(path)
    return _file_digest(path, stat.st_size, stat.st_mtime_ns)


@cache
def _file_digest(path: str, size: int, changed_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pinned(value: str) -> str:
    """A file's name with the digest of its content, which belongs to the recipe; a pinned one need not be here any more."""
    if value in NAMED_WEIGHTS or _PINNED.fullmatch(value):
        return value
    path = os.path.abspath(os.path.expanduser(value))
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        known = f"{', '.join(NAMED_WEIGHTS)} or a file{did_you_mean(value, NAMED_WEIGHTS)}"
        raise ValueError(f"should be {known}; there is no such file")
    return f"{path}#sha256={file_digest(path)}"


class Timm(Section):
    """Any network of timm, with or without weights to start from, `pipeline/models/timm.py`."""

    network: Literal["timm"] = "timm"
    backbone: str = Field(
        "tf_efficientnet_lite0",
        pattern=r"^\w+(\.\w+)?$",  # no path or address, as timm's names of hubs and folders are
        description="timm's name, such as resnet18 or resnet18.a1_in1k",
    )
    weights: Annotated[str, AfterValidator(_pinned)] = Field(
        "none",
        description="none; default (timm downloads them); efficientnet-lite0 (from a package, for that backbone); or a "
        "file, .safetensors or .pth, kept with its digest: path#sha256=...",
    )
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth: probability that a block is left out")
    dropout: float = Field(0.0, ge=0, lt=1, description="before the classifier")

    @property
    def weights_file(self) -> tuple[str, str] | None:
        """(path, SHA-256) where the weights are a file of the user's."""
        pinned = _PINNED.fullmatch(self.weights)
        return (pinned["path"], pinned["sha256"]) if pinned else None

    @property
    def halvings(self) -> int:
        """Unknown here: `models.build.check_network` asks the network itself."""
        return 0


# A probability, or the one mode that needs none.
Flip = Annotated[
    Annotated[Fraction, Tag("probability")] | Annotated[Literal["alternating"], Tag("alternating")],
    Discriminator(lambda value: "alternating" if isinstance(value, str) else "probability"),
]


class Augmentation(Section):
    """Augmentation of a training image, drawn for each image and epoch: crop, flip, the policy's part, erasing, mixing.

    These are the fields that all policies have; 0 switches a step off.
    """

    crop_padding: int = Field(4, ge=0, le=64, description="pixels; pad by so many, then crop at random")
    crop_mode: Literal["reflect", "constant"] = Field(
        "reflect", description="what the padding shows: a mirror, or black"
    )
    horizontal_flip: Flip = Field(
        0.5, description="probability; or alternating: at random in the first epoch, then the other way round each time"
    )
    erasing: Fraction = Field(
        0.0, description="probability of a rectangle replaced by the mean colour (random erasing)"
    )
    mixup: Fraction = Field(0.0, description="probability that an image is blended with another")
    mixup_alpha: float = Field(0.2, gt=0, le=10, description="the blend is Beta(alpha, alpha)")
    cutmix: Fraction = Field(0.0, description="probability that an image gets a rectangle of another")
    cutmix_alpha: float = Field(1.0, gt=0, le=10, description="the kept area is Beta(alpha, alpha)")

    @model_validator(mode="after")
    def _mixing_is_exclusive(self) -> Self:
        if self.mixup + self.cutmix > 1:
            raise ValueError(f"mixup {self.mixup} and cutmix {self.cutmix} exclude each other: their sum is at most 1")
        return self


class Custom(Augmentation):
    """Geometry and colours as these fields say, in this order; 0 switches a step off."""

    policy: Literal["custom"] = "custom"
    rotation: float = Field(0.0, ge=0, le=180, description="degrees; the angle is uniform in [-rotation, rotation]")
    perspective: Fraction = Field(0.0, description="distortion scale, as in torchvision's RandomPerspective")
    perspective_probability: Fraction = 0.5
    brightness: Fraction = Field(0.0, description="the factor is uniform in [1 - b, 1 + b]")
    contrast: Fraction = Field(0.0, description="the factor is uniform in [1 - c, 1 + c]")
    saturation: Fraction = Field(0.0, description="the factor is uniform in [1 - s, 1 + s]")
    hue: float = Field(0.0, ge=0, le=0.5, description="the shift is uniform in [-hue, hue] turns of the colour wheel")


class NoPolicy(Augmentation):
    """Nothing but what all policies have."""

    policy: Literal["none"] = "none"


class TrivialAugment(Augmentation):
    """One of 14 operations at one of 31 magnitudes, all equally likely (TrivialAugment, wide, arXiv 2103.10158)."""

    policy: Literal["trivialaugment"] = "trivialaugment"


class RandAugment(Augmentation):
    """Operations of 14, one after the other, at one magnitude (RandAugment, arXiv 1909.13719)."""

    policy: Literal["randaugment"] = "randaugment"
    operations: int = Field(2, ge=1, le=4, description="drawn for each image; one may come twice")
    magnitude: int = Field(9, ge=0, le=30, description="of all operations; 30: shear 0.3, rotation 30 degrees ...")


class AugMix(Augmentation):
    """The image, blended with a mean of chains of 13 operations (AugMix, arXiv 1912.02781), without its loss."""

    policy: Literal["augmix"] = "augmix"
    severity: int = Field(3, ge=1, le=10, description="a magnitude is one of the lowest so many of 10")
    width: int = Field(3, ge=1, le=8, description="chains")
    depth: Literal[-1, 1, 2, 3] = Field(-1, description="operations of a chain; -1: one to three, at random")
    alpha: float = Field(
        1.0, ge=0.1, le=10, description="chains' parts: Dirichlet(alpha, ...); own: Beta(alpha, alpha)"
    )


class Sgd(Section):
    """torch.optim.SGD; `weight_decay` is its L2 coefficient, so a step shrinks the weights by lr * weight_decay."""

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
    follows the schedule. A step first sets the norm of each convolution's weights to the root of its output channels,
    so batch norm has to follow every convolution; filters don't decay.
    """

    name: Literal["muon"] = "muon"
    lr: float = Field(gt=0, le=100, description="of the filters: about the length that a step moves each of them")
    momentum: float = Field(0.6, ge=0, lt=1, description="of the filters")
    bias_lr: float = Field(gt=0, le=1e6, description="of biases, scales and all else that has one dimension")
    head_lr: float = Field(gt=0, le=1e6, description="of linear layers' weights")
    sgd_momentum: float = Field(0.85, ge=0, lt=1, description="of all but the filters")
    weight_decay: float = Field(
        0.004, ge=0, le=1, description="of all but the filters: their rate * L2 coefficient, whatever the rate"
    )
    whitening_share: Fraction = Field(
        1.0, description="of the training, in which a whitening layer's bias learns, the schedule squeezed into it"
    )


class Schedule(Section):
    """Fields of most schedules. Fractions are of all steps of the training, so a change of length keeps the shape."""

    warmup: float = Field(0.0, ge=0, lt=1, description="fraction of the steps in which the rate rises linearly from 0")


class Constant(Schedule):
    """The rate stays."""

    name: Literal["constant"] = "constant"


class Cosine(Schedule):
    """Half a cosine down (SGDR without restarts, arXiv 1608.03983)."""

    name: Literal["cosine"] = "cosine"
    final_fraction: Fraction = Field(0.0, description="the last rate, as a fraction of the highest")


class Linear(Schedule):
    """A straight line down."""

    name: Literal["linear"] = "linear"
    final_fraction: Fraction = Field(0.0, description="the last rate, as a fraction of the highest")


class OneCycle(Section):
    """Up to the highest rate and down again, both by half a cosine (1cycle, arXiv 1708.07120)."""

    name: Literal["one_cycle"] = "one_cycle"
    initial_fraction: Fraction = Field(0.04, description="the first rate, as a fraction of the highest")
    peak: float = Field(0.3, gt=0, lt=1, description="where the highest rate stands, as a fraction of the steps")
    final_fraction: Fraction = Field(0.0, description="the last rate, as a fraction of the highest")


class Step(Schedule):
    """The rate is multiplied by `gamma` after each `interval`."""

    name: Literal["step"] = "step"
    interval: float = Field(0.3, gt=0, le=1, description="fraction of the steps between two drops")
    gamma: float = Field(0.1, gt=0, le=1)


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


class Transfer(Section):
    """Which layers learn, and how fast: for networks that start from weights. Layers are counted from the image.

    A layer is what timm takes for one, in networks of our own a convolution or linear layer with its norm; the last one,
    the head, always learns.
    """

    frozen_epochs: int = Field(0, ge=0, le=10_000, description="epochs at the start in which only the head learns")
    frozen_share: Fraction = Field(0.0, description="share of the layers below the head that never learn")
    layer_decay: float = Field(1.0, gt=0, le=1, description="each layer's rate, as a fraction of that of the next one")
    head_multiple: float = Field(1.0, gt=0, le=1000, description="the head's rate, as a multiple of the optimizer's")


class Training(Section):
    """Length, batch, precision, seed and execution of a training."""

    epochs: int = Field(ge=1, le=10_000)
    batch_size: int = Field(128, ge=2, le=65_536)
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 where the hardware has it")
    clip_norm: float = Field(0.0, ge=0, description="largest norm of the gradient of all weights; 0: not clipped")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="exponential moving average of the weights; 0: none")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="initial weights, data order, augmentation, dropout")
    deterministic: bool = Field(False, description="on a GPU: bit for bit the same run again, slower; a CPU always is")
    execution: Literal["eager", "compiled", "graphed", "compiled_graphed"] = Field(
        "eager", description="of a step: kernel by kernel, by compiled code, as a replayed CUDA graph, as both"
    )


Model = Annotated[
    Attention | Baseline | Cct | Efficient | Expert | Fast | Improved | Plain | Timm,
    Field(discriminator="network"),
]
Optimizer = Annotated[Sgd | Adam | AdamW | Muon, Field(discriminator="name")]
AnySchedule = Annotated[Constant | Cosine | Linear | OneCycle | Step, Field(discriminator="name")]


def _by_default(**kind: str) -> BeforeValidator:
    """The kind of a section in recipes of before it had kinds, which name none."""
    return BeforeValidator(lambda section: {**kind, **section} if isinstance(section, Mapping) else section)


AnyAugmentation = Annotated[
    Custom | NoPolicy | TrivialAugment | RandAugment | AugMix,
    Field(discriminator="policy"),
    _by_default(policy="custom"),
]
AnyLoss = Annotated[CrossEntropy | Focal, Field(discriminator="name"), _by_default(name="cross_entropy")]

# The field of a section that says which kind it is; a change of kind starts from that kind's defaults.
KIND = {"model": "network", "augmentation": "policy", "optimizer": "name", "schedule": "name", "loss": "name"}
# Section -> kind -> the class that holds it.
_KINDS: dict[str, dict[str, type[Section]]] = {
    section: {kind.model_fields[KIND[section]].default: kind for kind in get_args(get_args(union)[0])}
    for section, union in {
        "model": Model,
        "augmentation": AnyAugmentation,
        "optimizer": Optimizer,
        "schedule": AnySchedule,
        "loss": AnyLoss,
    }.items()
}
# Section -> fields that mean the same in each of its kinds: a change of kind keeps their values.
_KEPT = {"augmentation": frozenset(Augmentation.model_fields), "loss": frozenset(Loss.model_fields)}
_TAGS = frozenset(kind for kinds in _KINDS.values() for kind in kinds) | {"probability", "alternating"}


def kind_field(name: str) -> str:
    """The dotted name of the field that says a section's kind, from the name of the section or of one of its fields."""
    section = name.partition(".")[0]
    return f"{section}.{KIND[section]}"


def kinds_with(name: str) -> list[str]:
    """The kinds of a section that have the field of this dotted name; none for a section without kinds."""
    section, _, field = name.partition(".")
    return [kind for kind, fields in _KINDS.get(section, {}).items() if field in fields.model_fields]


def has_default(name: str, kind: str) -> bool:
    """Whether the field of this dotted name has a default in this kind, which has the field."""
    section, _, field = name.partition(".")
    return not _KINDS[section][kind].model_fields[field].is_required()


# Fields added later, with the value that equals the behaviour before: with it they are left out of the digest.
LATER = {
    "data.train_fraction": 1.0,
    "data.folds": 0,
    "data.fold": 0,
    "data.test_fraction": 0.1,
    "data.columns": ",".join(COLUMNS),
    "data.duplicates": "drop",
    "data.corrupt": "refuse",
    "data.geometry": "squash",
    "data.crop_scale": 0.35,
    "data.sampler": "uniform",
    "data.sampler_power": 1.0,
    "loss.name": "cross_entropy",
    "loss.class_weights": 0.0,
    "model.attention": "cbam",
    "augmentation.policy": "custom",
    "training.execution": "eager",
    "transfer.frozen_epochs": 0,
    "transfer.frozen_share": 0.0,
    "transfer.layer_decay": 1.0,
    "transfer.head_multiple": 1.0,
}


class Recipe(Section):
    """Everything that a run depends on but the data's bytes, the code and the machine."""

    data: Data = Data()
    model: Model
    augmentation: AnyAugmentation = Custom()
    optimizer: Optimizer
    schedule: AnySchedule = Cosine()
    loss: AnyLoss = CrossEntropy()
    transfer: Transfer = Transfer()
    training: Training

    @model_validator(mode="after")
    def _network_fits(self) -> Self:
        halvings, size = self.model.halvings, self.data.image_size
        if size < 2**halvings:
            raise ValueError(
                f"model.network {self.model.network} halves images {halvings} times: data.image_size {size} must be at "
                f"least {2**halvings}, or model.widths fewer"
            )
        return self

    @model_validator(mode="after")
    def _mirror_fits(self) -> Self:
        padding, size = self.augmentation.crop_padding, self.data.image_size
        if self.augmentation.crop_mode == "reflect" and padding >= size:
            raise ValueError(
                f"augmentation.crop_padding {padding} mirrors images of data.image_size {size}: must be smaller"
            )
        return self

    def flat(self) -> dict[str, Any]:
        """Dotted field name -> value, of every field."""
        return {
            f"{section}.{field}": value
            for section, fields in self.model_dump().items()
            for field, value in fields.items()
        }

    def changed(self, changes: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> "Recipe":
        """A copy with some dotted fields changed, validated together.

        Changing a section's kind (`optimizer.name`) starts that section from the new kind's defaults; a field keeps its
        value, where it has any, if it has no default or is one that all policies of augmentation share. `settings`
        override `changes`: they are applied last, as far as the section's kind then has such a field. Raises UserError
        with a problem for each fault.
        """
        settings = settings or {}
        sections = self.model_dump()
        assigned = {**changes, **settings}
        known = {name: value for name, value in assigned.items() if name.partition(".")[0] in sections and "." in name}
        problems = [Problem(name, NO_SUCH_FIELD) for name in assigned if name not in known]
        for section, field in KIND.items():
            kind = known.get(f"{section}.{field}", sections[section][field])
            if kind != sections[section][field]:
                sections[section] = _section_of_kind(section, kind, sections[section])
        for dotted, value in known.items():
            section, _, field = dotted.partition(".")
            kinds = kinds_with(dotted)
            if dotted not in settings or not kinds or sections[section][KIND[section]] in kinds:
                sections[section][field] = value
        try:
            recipe = parse_recipe(sections)
        except UserError as error:
            problems += error.problems
        if problems:
            raise UserError.many([self._with_hint(problem) for problem in problems])
        return recipe

    def _with_hint(self, problem: Problem) -> Problem:
        """For an unknown field, the kinds that have it, or the known one that may be meant: of its section, or of all."""
        if problem.rule != NO_SUCH_FIELD:
            return problem
        if kinds := kinds_with(problem.subject):
            return replace(problem, remedy=f"{kind_field(problem.subject)} {' or '.join(kinds)} has it")
        section, _, field = problem.subject.partition(".")
        siblings = [name.partition(".")[2] for name in self.flat() if name.startswith(f"{section}.")]
        if siblings:
            hint = did_you_mean(field, siblings).replace("mean ", f"mean {section}.")
        else:
            hint = did_you_mean(problem.subject, self.flat())
        return replace(problem, rule=problem.rule + hint)

    def difference(self, other: "Recipe") -> dict[str, tuple[Any, Any]]:
        """Dotted field -> (this recipe's value, the other's) where they differ; None where a kind has no such field."""
        fields, others = self.flat(), other.flat()
        return {
            name: (fields.get(name), others.get(name))
            for name in fields | others
            if fields.get(name) != others.get(name) or (name in fields) != (name in others)
        }

    def to_json(self) -> str:
        """Readable JSON; `parse_recipe` takes it back."""
        return self.model_dump_json(indent=2)

    def digest(self) -> str:
        """64 hexadecimal digits that change with any field."""
        sections = self.model_dump(mode="json")
        for section, field in (name.split(".") for name, before in LATER.items() if self.flat().get(name) == before):
            del sections[section][field]
            if not sections[section]:
                del sections[section]
        canonical = json.dumps(sections, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def _section_of_kind(section: str, kind: Any, before: Mapping[str, Any]) -> dict[str, Any]:
    """A section of a new kind: its defaults, and from `before` the fields that have none or mean the same."""
    fields = _KINDS[section][kind].model_fields if isinstance(kind, str) and kind in _KINDS[section] else {}
    return {KIND[section]: kind} | {
        name: before[name]
        for name, field in fields.items()
        if name in before and (field.is_required() or name in _KEPT.get(section, ()))
    }


def parse_recipe(source: str | bytes | Mapping[str, Any]) -> Recipe:
    """A recipe from JSON text or nested dictionaries; UserError with a problem for each fault."""
    try:
        if isinstance(source, (str, bytes)):
            return Recipe.model_validate_json(source)
        return Recipe.model_validate(source)
    except ValidationError as error:
        raise UserError.many(validation_problems(error, _TAGS)) from None
