"""Triton's interpreter cuts float32 off to bfloat16 where a GPU rounds to nearest even; here it rounds as a GPU does."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

if importlib.util.find_spec("triton") is not None:
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source != tl.float32 or target != tl.bfloat16:
            return convert(data, source, target, mode)
        bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)

    interpreter._convert_float = rounding
