"""Rows of the packed table that a checkpoint holds beside the whole table: numbers and values, a piece from each owner.

A piece's name says which rows its owner had ("KIND.LOW-HIGH.numbers", …), so that owners of other ranges, at another layout,
find theirs. Numbers are of the packed table, int64, ascending.
"""

from __future__ import annotations

from collections.abc import Iterable


def piece_name(kind: str, low: int, high: int) -> str:
    """Of the owner of rows `low` to `high-1`."""
    return f"{kind}.{low}-{high}"


def pieces_for(names: Iterable[str], kind: str, low: int, high: int) -> list[str]:
    """The pieces of a kind, by the names of a checkpoint's tensors, that may have rows among `low` to `high-1`."""
    out = []
    for name in names:
        if name.startswith(f"{kind}.") and name.endswith(".numbers"):
            theirs = [int(bound) for bound in name.removeprefix(f"{kind}.").split(".")[0].split("-")]
            if theirs[0] < high and low < theirs[1]:
                out.append(name.removesuffix(".numbers"))
    return out
