"""Small tables and row ids for the tests of exchanges; all numbers are small integers, so sums are exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hybridtrain.parallel.checksums import ExchangeError

WIDTH = 3
SHAPE = (4, 2, 5, 2, 2)  # M, B, T, L, S


def table(num_rows: int) -> Tensor:
    return torch.arange(num_rows * WIDTH, dtype=torch.float64).view(num_rows, WIDTH)


def scattered(rank: int, num_rows: int) -> Tensor:
    """Ids over the whole table, many of them twice."""
    return torch.randint(num_rows, SHAPE, generator=torch.Generator().manual_seed(rank))


def message(act: Callable[[], Any]) -> str | None:
    try:
        act()
    except ExchangeError as error:
        return str(error)
    return None


def flip_a_bit(x: Tensor) -> None:
    x.view(torch.uint8)[0, 0] ^= 1  # of the first row, which comes from rank 0
