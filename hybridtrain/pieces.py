"""Rows of the packed table that a checkpoint holds beside the whole table: numbers and values, a piece from each owner.

A piece's name says which rows its owner had ("KIND.LOW-HIGH.numbers", …), so that owners of other ranges, at another layout,
find theirs. Numbers are of the packed table, int64, ascending.
"""

from __future__ import annotations

import re
from collections.abc import Iterable


def piece_name(kind: str, low: int, high: int) -> str:
    """Of the owner of rows `low` to `high-1`."""
    return f"{kind}.{low}-{high}"


def pieces_for(names: Iterable[str], kind: str, low: int, high: int) -> list[str]:
    """The pieces of a kind, by the names of a checkpoint's tensors, that may have rows among `low` to `high-1`.

    Raises ValueError where such a name does not say which rows it is of.
    """
    out = []
    for name in names:
        if name.startswith(f"{kind}.") and name.endswith(".numbers"):
            match = re.fullmatch(r"([0-9]{1,18})-([0-9]{1,18})\.numbers", name.removeprefix(f"{kind}."))
            if match is None:
                raise ValueError(f"{name} does not say which rows it is of")
            if int(match[1]) < high and low < int(match[2]):
                out.append(name.removesuffix(".numbers"))
    return out
