"""The section `schedule`, a class for each; `training/schedules.py` gives their factors."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.sections.section import Fraction, Section


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


AnySchedule = Annotated[Constant | Cosine | Linear | OneCycle | Step, Field(discriminator="name")]
