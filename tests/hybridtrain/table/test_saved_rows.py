"""Owners of any ranges find the pieces that may have rows of theirs."""

from __future__ import annotations

from hybridtrain.table.saved_rows import saved_rows_for, saved_rows_name


def test_pieces_are_found_by_their_rows_and_kind() -> None:
    pieces = [
        saved_rows_name("table.ahead", 0, 10),
        saved_rows_name("table.ahead", 10, 25),
        saved_rows_name("table.changed", 0, 25),
    ]
    names = [f"{piece}.{what}" for piece in pieces for what in ("numbers", "values")] + ["table.rows"]
    assert saved_rows_for(names, "table.ahead", 0, 25) == pieces[:2]
    assert saved_rows_for(names, "table.ahead", 9, 10) == pieces[:1]
    assert saved_rows_for(names, "table.ahead", 10, 11) == pieces[1:2]
    assert saved_rows_for(names, "table.ahead", 25, 30) == []
    assert saved_rows_for(names, "table.changed", 24, 25) == pieces[2:]
