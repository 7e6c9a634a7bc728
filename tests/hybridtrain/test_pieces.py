"""Owners of any ranges find the pieces that may have rows of theirs."""

from __future__ import annotations

from hybridtrain.pieces import piece_name, pieces_for


def test_pieces_are_found_by_their_rows_and_kind() -> None:
    pieces = [piece_name("memory.ahead", 0, 10), piece_name("memory.ahead", 10, 25), piece_name("memory.changed", 0, 25)]
    names = [f"{piece}.{what}" for piece in pieces for what in ("numbers", "values")] + ["memory.table"]
    assert pieces_for(names, "memory.ahead", 0, 25) == pieces[:2]
    assert pieces_for(names, "memory.ahead", 9, 10) == pieces[:1]
    assert pieces_for(names, "memory.ahead", 10, 11) == pieces[1:2]
    assert pieces_for(names, "memory.ahead", 25, 30) == []
    assert pieces_for(names, "memory.changed", 24, 25) == pieces[2:]
