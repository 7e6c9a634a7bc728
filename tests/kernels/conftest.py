"""Makes Triton's interpreter compute with bfloat16 and FP8 as a GPU does, and every test of kernels draw the
same numbers.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _same_numbers() -> Iterator[None]:
    """On a GPU (make test-gpu) what a test makes lies there, so that a kernel's tests run compiled as they do
    interpreted.
    """
    torch.manual_seed(0)
    with (
        torch.device("cuda")
        if os.environ["TRITON_INTERPRET"] == "0" and torch.cuda.is_available()
        else nullcontext()
    ):
        yield


if importlib.util.find_spec("triton") is not None:
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounding(data: Any, source: Any, target: Any, mode: Any) -> Any:
        """To nearest even, where the interpreter cuts off, or loses the carry into FP8's exponent."""
        if source == tl.float32 and target == tl.float8e4nv:
            return (
                torch.from_numpy(np.ascontiguousarray(data))
                .clamp(-448, 448)
                .to(torch.float8_e4m3fn)
                .view(torch.uint8)
                .numpy()
            )
        if source != tl.float32 or target != tl.bfloat16:
            return convert(data, source, target, mode)
        bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)

    def widening(self: Any, a: Any, b: Any, *others: Any) -> Any:
        """Products of bfloat16, where the interpreter multiplies their bits."""
        wide = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, *wide, *others)

    interpreter._convert_float = rounding
    interpreter.InterpreterBuilder.create_dot = widening
