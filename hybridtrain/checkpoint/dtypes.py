"""The dtypes that weights may have, whatever file they come from."""

from __future__ import annotations

from collections.abc import Mapping

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dtype_problems(dtypes: Mapping[str, torch.dtype | str]) -> list[str]:
    """Which tensors are of a dtype that is not read, by their names. A string is a dtype that torch has no
    name for.
    """
    legal = ", ".join(_name(dtype) for dtype in FLOATS)
    return [
        f"{name} is {_name(dtype)}: weights may be {legal}; dequantise others first"
        for name, dtype in dtypes.items()
        if dtype not in FLOATS
    ]


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")
