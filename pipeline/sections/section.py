"""What all sections of a recipe have in common."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """An immutable part of a recipe; unknown fields, NaN and infinity are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


def by_default(**kind: str) -> BeforeValidator:
    """The kind of a section in recipes of before it had kinds, which name none."""
    return BeforeValidator(lambda section: {**kind, **section} if isinstance(section, Mapping) else section)
