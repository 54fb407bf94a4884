"""The section `curriculum`; `training/progressive.py` computes it."""

from pydantic import Field

from pipeline.sections.section import Fraction, Section


class Curriculum(Section):
    """How images change over the training; size and strength rise linearly, from epoch to epoch."""

    start_size: int = Field(
        0,
        ge=0,
        le=512,
        description="pixels of the first images, scaled down; they grow to data.image_size by eighths of it; 0: none",
    )
    start_strength: Fraction = Field(
        1.0, description="share of the first images that get what policy, erasing and mixing do; it rises to 1"
    )
    until: float = Field(0.8, gt=0, le=1, description="share of the epochs in which both rise")
