"""The figures of a lookup table of a given shape: moduli, rows, parameters, bytes stored and bytes sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleRenderable, Group
from rich.table import Table

from hybridtrain.errors import SettingsError
from hybridtrain.kernels.engram_hash.addressing import draw_multipliers, draw_primes

DEEPSEEK_COMPRESSED_VOCAB = 99_092
ROW_STATE_BYTES = 8  # row-wise Adam: a float32 moment and an int32 step of last touch
DENSE_ADAM_BYTES = 14  # bfloat16 weight, and float32 master weight and two moments


@dataclass(frozen=True)
class TableShape:
    """What decides the size of a table.

    rows_per_head: least rows of a hash head; orders: n-gram lengths; heads: per order; dim: width of a row in
    elements; layers: 0-based numbers in the whole model; vocab_size: compressed ids, which bound the
    multipliers; bytes_per_element: of rows on the wire
    """

    rows_per_head: int
    orders: Sequence[int]
    heads: int
    dim: int
    layers: Sequence[int]
    vocab_size: int = DEEPSEEK_COMPRESSED_VOCAB
    bytes_per_element: int = 2


def report(shape: TableShape, seed: int = 0) -> dict[str, Any]:
    """The figures of a table, ready for JSON; `render` prints them. `seed` draws the multipliers.

    Raises SettingsError listing every value out of range.
    """
    problems = _problems(shape, seed)
    if problems:
        raise SettingsError("engram", problems)
    primes = draw_primes(len(shape.layers), len(shape.orders), shape.heads, shape.rows_per_head)
    multipliers = draw_multipliers(shape.layers, max(shape.orders), shape.vocab_size, seed)
    rows = int(primes.sum())
    parameters = rows * shape.dim
    lookups = len(shape.layers) * len(shape.orders) * shape.heads
    return {
        "layers": [
            {
                "layer": layer,
                "rows": int(primes[i].sum()),
                "parameters": int(primes[i].sum()) * shape.dim,
                "multipliers": multipliers[i].tolist(),
                "primes": {str(order): primes[i, o].tolist() for o, order in enumerate(shape.orders)},
            }
            for i, layer in enumerate(shape.layers)
        ],
        "rows": rows,
        "parameters": parameters,
        "bytes": {
            "rows_bf16": 2 * parameters,
            "rows_fp32": 4 * parameters,
            "rowwise_state": ROW_STATE_BYTES * rows,
            "dense_adam_total": DENSE_ADAM_BYTES * parameters,
        },
        "rows_read_per_token": lookups,
        "wire_bytes_per_token": lookups * shape.dim * shape.bytes_per_element,
    }


def render(figures: dict[str, Any]) -> ConsoleRenderable:
    """The figures of `report` as tables for a terminal."""
    moduli = Table(title="Hash heads", title_justify="left")
    for column in ("layer", "order", "primes (rows of each head)"):
        moduli.add_column(column, justify="left" if column.startswith("primes") else "right")
    for layer in figures["layers"]:
        for order, primes in layer["primes"].items():
            moduli.add_row(str(layer["layer"]), order, " ".join(f"{prime:,}" for prime in primes))
    packed = Table(title="Packed tables", title_justify="left")
    for column in ("layer", "rows", "parameters", "multipliers"):
        packed.add_column(column, justify="left" if column == "multipliers" else "right")
    for layer in figures["layers"]:
        multipliers = " ".join(str(multiplier) for multiplier in layer["multipliers"])
        packed.add_row(str(layer["layer"]), f"{layer['rows']:,}", f"{layer['parameters']:,}", multipliers)
    packed.add_section()
    packed.add_row("all", f"{figures['rows']:,}", f"{figures['parameters']:,}", "")
    return Group(moduli, packed, _costs(figures))


def print_report(figures: dict[str, Any], console: Console | None = None) -> None:
    """Print the figures of `report` to the console, standard output by default."""
    (console or Console()).print(render(figures))


def _costs(figures: dict[str, Any]) -> Table:
    costs = Table(title="Costs", title_justify="left", show_header=False)
    costs.add_column(justify="left")
    costs.add_column(justify="right")
    size = figures["bytes"]
    costs.add_row("rows in bfloat16", readable(size["rows_bf16"]))
    costs.add_row("rows in float32", readable(size["rows_fp32"]))
    costs.add_row(f"row-wise Adam's state, {ROW_STATE_BYTES} B a row", readable(size["rowwise_state"]))
    costs.add_row(
        f"dense Adam instead, {DENSE_ADAM_BYTES} B a parameter, weights included",
        readable(size["dense_adam_total"]),
    )
    costs.add_row("rows read per token", f"{figures['rows_read_per_token']:,}")
    costs.add_row("wire per token each way, before deduplication", readable(figures["wire_bytes_per_token"]))
    return costs


def readable(number: int) -> str:
    """Bytes with a decimal unit: 5120 is "5.12 kB"."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number} B"


def _problems(shape: TableShape, seed: int) -> list[str]:
    out = []
    for name, value in (
        ("rows-per-head", shape.rows_per_head),
        ("heads", shape.heads),
        ("dim", shape.dim),
        ("vocab-size", shape.vocab_size),
    ):
        if value < 1:
            out.append(f"{name}={value} must be at least 1")
    if seed < 0:
        out.append(f"seed={seed} must not be negative")
    if shape.bytes_per_element not in (1, 2, 4):
        out.append(
            f"bytes-per-element={shape.bytes_per_element} must be 1 (FP8), 2 (bfloat16) or 4 (float32)"
        )
    if not shape.orders or list(shape.orders) != sorted(set(shape.orders)) or min(shape.orders) < 2:
        out.append(f"orders={list(shape.orders)} must be rising n-gram lengths from 2 on, e.g. 2,3")
    if not shape.layers or list(shape.layers) != sorted(set(shape.layers)) or min(shape.layers) < 0:
        out.append(f"layers={list(shape.layers)} must be rising layer ids from 0 on, e.g. 1,14")
    return out
