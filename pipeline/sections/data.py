"""The section `data`."""

from typing import Annotated, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, model_validator

from pipeline.sections.section import Fraction, Section


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


# What of `data` says what is seen of an image. It may differ between the trials of a study, which share data set and split.
FORM_FIELDS = ("data.image_size", "data.geometry", "data.crop_scale")
# What of `data` says which images a folder or manifest holds, and which of them are sealed.
FILE_FIELDS = ("data.dataset", "data.columns", "data.test_fraction", "data.duplicates", "data.corrupt")
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
        description="what an epoch shows: each training image once, or those of rare classes more often, as many in all; "
        "the last ones of its random order, which don't fill a batch, are left out",
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
        """What is read of each image.

        Random crops are cut from twice the size, whatever their scale: trials that differ in it share what is decoded.
        More would need antialiasing, and JPEGs may be decoded at no more.
        """
        is_cut = self.geometry == "random_resized_crop"
        return Form(self.image_size, "crop" if is_cut else self.geometry, 2 * self.image_size if is_cut else None)
