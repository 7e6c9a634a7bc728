"""What every section of the settings is, and the kinds of number that its keys have."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Axis = Annotated[int, Field(ge=-1)]


class Section(BaseModel):
    """A table of the TOML file: frozen, typed, without unknown keys. It validates itself."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _names_something(cls, value: Any) -> Any:
        """Strings name files, folders, fields and tokens, which have no NUL; of several no one is empty."""
        texts = value if isinstance(value, tuple) else (value,)
        if any("\0" in text for text in texts if isinstance(text, str)):
            raise ValueError("has a NUL character")
        if isinstance(value, tuple) and "" in value:
            raise ValueError("has an empty entry")
        return value
