"""Helpers of every format: libraries, sizes, and folders that appear whole or not at all."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from pydantic import Field

from hybridtrain.errors import UserError
from hybridtrain.files.lock import NAME, locked

# of a foreign config: bounds that keep a tensor's size far from the end of 64 bits, and a list of layers
# short
Size = Annotated[int, Field(ge=1, le=1 << 24)]
Count = Annotated[int, Field(ge=1, le=1 << 16)]
Number = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def need_transformers() -> ModuleType:
    """The transformers package; UserError where it is not installed."""
    try:
        import safetensors  # noqa: F401
        import transformers
    except ImportError:
        raise UserError(
            "Hugging Face folders need transformers and safetensors: pip install 'hybridtrain[hf]'"
        ) from None
    return transformers


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which becomes `out` when all went well and is removed when not.

    Raises UserError where `out` exists and is not an empty folder, cannot be written, or another process is
    making it.
    """
    _refuse_used(out)  # before anything is written beside it
    with locked(out, file=out.with_name(f".{out.name}{NAME}")):
        _refuse_used(out)
        making = out.with_name(f".{out.name}.partial")
        try:
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir(parents=True)
            yield making
            if out.exists():
                out.rmdir()
            making.rename(out)
        except OSError as error:
            raise UserError(f"{error.filename or out}: cannot be written: {error.strerror}") from None
        finally:
            shutil.rmtree(making, ignore_errors=True)


def _refuse_used(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; choose another folder")


def parse_size(option: str, text: str) -> int:
    """Bytes of "5GB", "200MB", "64K" or a plain number; units of a thousand, as transformers has them."""
    match = re.fullmatch(r"(\d+)\s*([KMG]?B?)", text.strip().upper())
    if match is None or int(match[1]) == 0:
        raise UserError(f'{option} "{text}": write a number of bytes with KB, MB or GB, e.g. 5GB')
    return int(match[1]) * _UNITS[match[2].rstrip("B")]


def among(value: Any, legal: tuple[Any, ...]) -> bool:
    """Whether a foreign value is one of the legal ones; True and 1 are not the same, 1 and 1.0 are."""
    if not isinstance(value, bool | int | float | str | list | dict | None):
        return False
    try:
        return any(
            bool(value == other) and isinstance(value, bool) == isinstance(other, bool) for other in legal
        )
    except Exception:  # whatever comparing with an object of a foreign class raises
        return False


def is_off(value: Any) -> bool:
    """Whether a foreign value turns nothing on: null, false, zero or empty."""
    return among(value, (None, False, 0, "", [], {}))
