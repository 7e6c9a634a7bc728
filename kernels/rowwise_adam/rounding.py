"""How rows of bfloat16 tables are rounded, at random: a step smaller than half a unit of the last place then
moves a row by its right amount on average. N rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def round_stochastically(x_ND: Tensor, numbers_N: Tensor, seed: int) -> Tensor:
    """bfloat16, up or down with the probabilities that make x the mean; what is not a number stays none.

    16 bits of `noise` are added below those that stay. They depend on the seed, the column, and the row's
    number int64 alone.
    """
    columns = torch.arange(x_ND.size(1), device=x_ND.device)
    noise: Tensor = mix(mix((numbers_N[:, None] * x_ND.size(1) + columns) & 0xFFFFFFFF) ^ seed) >> 16
    rounded = ((x_ND.float().view(torch.int32) + noise.int()) & -0x10000).view(torch.float32)
    return rounded.where(x_ND == x_ND, x_ND).bfloat16()


def mix(x: Any) -> Any:
    """A hash of numbers from 0 to 2^32 - 1: every bit of x moves every bit (lowbias32,
    github.com/skeeto/hash-prospector).
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def rounding_seed(seed: int, step: int) -> int:
    """The seed of a step's rounding in a run of this seed; 31 bits."""
    return int(mix(mix(seed & 0xFFFFFFFF) ^ step) >> 1)
