"""The definition of the gather. R rows of a table, D width, U rows asked for."""

from __future__ import annotations

from torch import Tensor


def row_gather(table_RD: Tensor, rows_U: Tensor) -> Tensor:
    """[U, D]: the rows in the order asked for; row -1 is zero."""
    return table_RD[rows_U.clamp_min(0)] * (rows_U >= 0)[:, None]
