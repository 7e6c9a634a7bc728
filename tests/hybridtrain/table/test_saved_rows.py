"""Owners of any ranges find the pieces that may have rows of theirs."""

from __future__ import annotations

from hybridtrain.table.saved_rows import saved_rows_for, saved_rows_name


def test_pieces_are_found_by_their_rows_and_kind() -> None:
    pieces = [
        saved_rows_name("memory.ahead", 0, 10),
        saved_rows_name("memory.ahead", 10, 25),
        saved_rows_name("memory.changed", 0, 25),
    ]
    names = [f"{piece}.{what}" for piece in pieces for what in ("numbers", "values")] + ["memory.table"]
    assert saved_rows_for(names, "memory.ahead", 0, 25) == pieces[:2]
    assert saved_rows_for(names, "memory.ahead", 9, 10) == pieces[:1]
    assert saved_rows_for(names, "memory.ahead", 10, 11) == pieces[1:2]
    assert saved_rows_for(names, "memory.ahead", 25, 30) == []
    assert saved_rows_for(names, "memory.changed", 24, 25) == pieces[2:]
