"""What both directions need: transformers, and folders that are there whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from hybridtrain.errors import UserError


def need_transformers() -> ModuleType:
    """The transformers package; UserError where it is not installed."""
    try:
        import safetensors  # noqa: F401
        import transformers
    except ImportError:
        raise UserError("Hugging Face folders need transformers and safetensors: pip install 'hybridtrain[hf]'") from None
    return transformers


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which becomes `out` when all went well and is removed when not.

    Raises UserError where `out` exists and is no empty folder, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; choose another folder")
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
