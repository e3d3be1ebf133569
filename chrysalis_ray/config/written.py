"""What every class for people's YAML is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Names = tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$")], ...]  # ends of the names of modules


class Written(BaseModel):
    """Base of everything a person writes: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=False)
