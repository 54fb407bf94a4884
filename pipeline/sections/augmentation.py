"""The section `augmentation`, a class for each policy; `data/policies.py` applies them."""

from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from pipeline.sections.section import Fraction, Section, by_default

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

    @property
    def changes_nothing(self) -> bool:
        """Whether an image looks the same in every epoch."""
        common = self.crop_padding, self.horizontal_flip, self.erasing, self.mixup, self.cutmix
        return not any(common) and self._policy_changes_nothing

    @property
    def _policy_changes_nothing(self) -> bool:
        return False


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

    @property
    def _policy_changes_nothing(self) -> bool:
        strengths = self.rotation, self.perspective, self.brightness, self.contrast, self.saturation, self.hue
        return not any(strengths)


class NoPolicy(Augmentation):
    """Nothing but what all policies have."""

    policy: Literal["none"] = "none"

    @property
    def _policy_changes_nothing(self) -> bool:
        return True


class TrivialAugment(Augmentation):
    """One of 14 operations at one of 31 magnitudes, all equally likely (TrivialAugment, wide, arXiv 2103.10158)."""

    policy: Literal["trivialaugment"] = "trivialaugment"


class RandAugment(Augmentation):
    """Operations of 14, one after the other, at one magnitude (RandAugment, arXiv 1909.13719)."""

    policy: Literal["randaugment"] = "randaugment"
    operations: int = Field(2, ge=1, le=4, description="drawn for each image; one may come twice")
    magnitude: int = Field(9, ge=0, le=30, description="of all operations; 30: shear 0.3, rotation 30 degrees ...")


class AugMix(Augmentation):
    """The image, blended with a mean of chains of 13 operations (AugMix, arXiv 1912.02781)."""

    policy: Literal["augmix"] = "augmix"
    severity: int = Field(3, ge=1, le=10, description="a magnitude is one of the lowest so many of 10")
    width: int = Field(3, ge=1, le=8, description="chains")
    depth: Literal[-1, 1, 2, 3] = Field(-1, description="operations of a chain; -1: one to three, at random")
    alpha: float = Field(
        1.0, ge=0.1, le=10, description="chains' parts: Dirichlet(alpha, ...); own: Beta(alpha, alpha)"
    )
    consistency: float = Field(
        0.0,
        ge=0,
        le=100,
        description="weight of a loss for differing predictions of the image and two mixtures of it; 12 in the paper",
    )


AnyAugmentation = Annotated[
    Custom | NoPolicy | TrivialAugment | RandAugment | AugMix,
    Field(discriminator="policy"),
    by_default(policy="custom"),
]
