"""Owners of any ranges find the saved rows that may hold rows of theirs."""

from __future__ import annotations

from hybridtrain.table.saved_rows import saved_rows_for, saved_rows_name


def test_saved_rows_are_found_by_their_rows_and_kind() -> None:
    saved = [
        saved_rows_name("table.ahead", 0, 10),
        saved_rows_name("table.ahead", 10, 25),
        saved_rows_name("table.changed", 0, 25),
    ]
    names = [f"{name}.{what}" for name in saved for what in ("numbers", "values")] + ["table.rows"]
    assert saved_rows_for(names, "table.ahead", 0, 25) == saved[:2]
    assert saved_rows_for(names, "table.ahead", 9, 10) == saved[:1]
    assert saved_rows_for(names, "table.ahead", 10, 11) == saved[1:2]
    assert saved_rows_for(names, "table.ahead", 25, 30) == []
    assert saved_rows_for(names, "table.changed", 24, 25) == saved[2:]
