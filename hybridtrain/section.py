"""The base class of every section of the settings, and the kinds of numbers that their keys have."""

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

    def problems(self) -> list[str]:
        """The ways in which its values do not fit each other: a line each, which begins with the key and says
        which values would be legal. The section's own name is put before it.
        """
        return []


def divisors_of(number: int) -> str:
    """The divisors of `number` in words: "1, 2 or 4"."""
    divisors = [str(d) for d in range(1, number + 1) if number % d == 0]
    return divisors[0] if len(divisors) == 1 else f"{', '.join(divisors[:-1])} or {divisors[-1]}"
