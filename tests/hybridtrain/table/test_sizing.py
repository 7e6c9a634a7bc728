from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from hybridtrain.errors import SettingsError
from hybridtrain.kernels.engram_hash.addressing import Addressing
from hybridtrain.kernels.engram_hash.addressing import TableShape as Drawn
from hybridtrain.table.sizing import TableShape, print_report, readable, report


def test_published_figures():
    paper = report(TableShape(2_262_400, [2, 3], 8, 80, [1, 14]))
    assert round(paper["parameters"] / 1e9, 2) == 5.79
    assert paper["wire_bytes_per_token"] == 5120
    flash = report(TableShape(16_000_000, [2, 3, 4], 8, 256, [1, 14]))
    assert [layer["rows"] for layer in flash["layers"]] == [384_006_168, 384_016_682]
    assert flash["layers"][0]["multipliers"] == [
        76632096046245,
        4839876093313,
        35959672319349,
        73987337458391,
    ]
    assert flash["wire_bytes_per_token"] == 24_576
    assert round(flash["bytes"]["dense_adam_total"] / 1e12, 2) == 2.75
    assert round(flash["bytes"]["rows_bf16"] / 1e9) == 393


def test_figures_belong_together_and_fit_the_addressing():
    figures = report(TableShape(100, [2, 4], 3, 5, [0, 2, 7], 50, 1), seed=9)
    assert json.loads(json.dumps(figures)) == figures
    drawn = Addressing.draw(Drawn([0, 2, 7], [2, 4], 3, 100), list(range(50)), pad_id=0, seed=9)
    for i, layer in enumerate(figures["layers"]):
        assert (
            layer["rows"]
            == drawn.rows_per_layer[i]
            == sum(sum(primes) for primes in layer["primes"].values())
        )
        assert layer["primes"] == {"2": drawn.primes[i, 0].tolist(), "4": drawn.primes[i, 1].tolist()}
        assert layer["multipliers"] == drawn.multipliers[i].tolist()
    rows = drawn.num_rows
    assert (figures["rows"], figures["parameters"]) == (rows, 5 * rows)
    assert figures["bytes"] == {
        "rows_bf16": 10 * rows,
        "rows_fp32": 20 * rows,
        "rowwise_state": 8 * rows,
        "dense_adam_total": 70 * rows,
    }
    assert (figures["rows_read_per_token"], figures["wire_bytes_per_token"]) == (18, 90)


def test_the_printed_report_has_the_figures():
    console = Console(width=140, file=io.StringIO(), record=True)
    print_report(report(TableShape(16_000_000, [2, 3, 4], 8, 256, [1, 14])), console)
    text = console.export_text()
    for figure in ("384,006,168", "384,016,682", "76632096046245", "2.75 TB", "24.58 kB", "6.14 GB"):
        assert figure in text


def test_every_bad_value_is_listed():
    with pytest.raises(SettingsError, match="8 problem") as caught:
        report(TableShape(0, [3, 2], 0, 0, [-1], 0, 3), seed=-1)
    for message in (
        "rows-per-head=0",
        "orders=",
        "heads=0",
        "dim=0",
        "layers=",
        "seed=-1",
        "vocab-size=0",
        "bytes-per-element=3",
    ):
        assert caught.match(message)


@pytest.mark.parametrize(("orders", "layers"), [([], [1]), ([1, 2], [1]), ([2], []), ([2], [1, 1])])
def test_bad_lists_are_refused(orders, layers):
    with pytest.raises(SettingsError, match="1 problem"):
        report(TableShape(10, orders, 1, 1, layers))


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (5120, "5.12 kB"), (10**9, "1.00 GB"), (2 * 10**15, "2000.00 TB")],
)
def test_readable(number, text):
    assert readable(number) == text
