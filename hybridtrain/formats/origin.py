"""The description of an imported model, kept in the run folder (origin.json) for exports to give back.

Our settings decide what the model computes; all other keys of a config.json or Megatron's arguments go out as
they came.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from hybridtrain.errors import UserError
from hybridtrain.files.untrusted import read_json
from hybridtrain.formats.hf_config import TOKEN_IDS, generation_ids
from hybridtrain.run.init_from import ORIGIN


class Origin(BaseModel):
    """config: the whole config.json of an import, or None. args: those of Megatron's arguments that an export
    gives back, or None. dtype: of the stored weights. positions: tokens of the longest text that the model is
    for, or None where nothing says so."""

    config: dict[str, Any] | None = None
    args: dict[str, Any] | None = None
    dtype: str = "float32"
    positions: Annotated[int, Field(ge=1, le=1 << 40)] | None = None

    def longest(self, trained: int) -> int:
        """Tokens of the longest text that the model is for: as it came, or `trained` where that is longer or
        nothing came.
        """
        return max(self.positions or trained, trained)

    def token_ids(self, run: Path, separator: int) -> dict[str, Any]:
        """Ids of special tokens for a config.json: those that came, else those of generation_config.json,
        else the separator.
        """
        if self.config is not None:
            return {key: self.config[key] for key in TOKEN_IDS if key in self.config}
        return generation_ids(run) or {"bos_token_id": separator, "eos_token_id": separator}


def read_origin(run: Path) -> Origin:
    """The origin of a run folder; one that says nothing where the model was trained from new. Raises
    UntrustedFileError.
    """
    try:
        return read_json(run / ORIGIN, Origin)
    except FileNotFoundError:
        return Origin()
    except OSError as error:
        raise UserError(f"{run / ORIGIN}: cannot be read: {error.strerror}") from None
