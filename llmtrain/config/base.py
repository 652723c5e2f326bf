"""What every section of the configuration is made of: strict numbers, no unknown keys.

Why apart: the sections lie in several files, and all must refuse the same mistakes.

    class DataConfig(Section): block_size: Positive = 1024
"""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def whole(value: object) -> object:
    """`7e4` is a float to YAML and a number of steps to a person."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Positive = Annotated[int, BeforeValidator(whole), Field(gt=0)]
Natural = Annotated[int, BeforeValidator(whole), Field(ge=0)]
Seed = Annotated[int, BeforeValidator(whole), Field(ge=0, lt=2**63)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Fraction, Fraction], Field(strict=False)]


class Section(BaseModel):
    """A part of the configuration: no unknown keys, no silent conversions, no change once read."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
