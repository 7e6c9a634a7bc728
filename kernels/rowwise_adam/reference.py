"""The definition of one step of the row-wise optimizers on the rows a step touched. R rows, D width, N
touched rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """The numbers of one update; Adam has gain 1 - beta2 and correction 1 - beta2^number, Adagrad beta2, gain
    and correction 1.
    """

    number: int  # counted from 1
    lr: float
    eps: float
    beta2: float
    gain: float
    correction: float
    seed: int = 0  # with the row's number in the whole table it decides how bfloat16 rows are rounded
    first_row: int = 0  # this table's first row in the whole one


def rowwise_adam(
    table_RD: Tensor,
    v_R: Tensor,
    last_R: Tensor,
    rows_N: Tensor,
    grad_ND: Tensor,
    decay: Tensor | None,
    step: Step,
) -> tuple[Tensor, Tensor, Tensor]:
    """New (table, v, last), the table unrounded; `decay[t]` is the log of the product of the decay factors up
    to step t.

    v <- beta2^(number - last) v + gain mean(g^2);  w <- w exp(decay[number] - decay[last]) - lr g / (sqrt(v /
    correction) + eps)
    """
    last_N = last_R[rows_N]
    v_N = v_R[rows_N] * torch.pow(step.beta2, (step.number - last_N).double()).to(
        v_R.dtype
    ) + step.gain * grad_ND.square().mean(1)
    weights_ND = table_RD[rows_N].to(grad_ND.dtype)
    if decay is not None:
        weights_ND = weights_ND * (decay[step.number] - decay[last_N]).exp().to(grad_ND.dtype)[:, None]
    weights_ND = weights_ND - (step.lr / ((v_N / step.correction).sqrt() + step.eps))[:, None] * grad_ND
    return (
        table_RD.to(grad_ND.dtype).index_copy(0, rows_N, weights_ND),
        v_R.index_copy(0, rows_N, v_N),
        last_R.index_fill(0, rows_N, step.number),
    )


def round_stochastically(x_ND: Tensor, numbers_N: Tensor, seed: int) -> Tensor:
    """bfloat16, up or down with the probabilities that make x the mean; what is no number stays none.

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
