"""The addressing of a model's lookup tables: token compression, hash multipliers, prime moduli and row
offsets.

Shapes: V vocabulary, V' compressed vocabulary, L Engram layers, O n-gram orders, K hash heads per order, S =
O * K slots. The maths is in README.md beside this file.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from hybridtrain.kernels.engram_hash.primes import is_prime, next_prime

Int64s = npt.NDArray[np.int64]
Boundary = Literal["document", "stream"]

FORMAT = 1
_MAX_TEXT = 1 << 20  # of thirty thousand heads
_INT64_MAX = np.iinfo(np.int64).max
_LAYER_STRIDE = 10007  # distance between the seeds of neighbouring layers, as the published models have it
_KEYS = ("layers", "orders", "heads", "multipliers", "primes", "pad_id", "boundary")


class AddressingError(ValueError):
    """An addressing is malformed; the message lists every problem found, one a line."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__(
            "\n".join([f"addressing: {len(self.problems)} problem(s)", *(f"  {p}" for p in self.problems)])
        )


class TableShape(NamedTuple):
    """Layers, orders and heads of an addressing, and the least number of rows of one head."""

    layers: Sequence[int]
    orders: Sequence[int]
    heads: int
    rows_per_head: int


@dataclass(frozen=True, eq=False)
class Addressing:
    """Everything that turns tokens into row numbers. Two addressings are the same when their `to_json()` are.

    layers: 0-based ids of the Engram layers in the whole model, rising. orders: n-gram lengths, rising.
    multipliers int64 [L, max(orders)]; primes int64 [L, O, K], all different; compression int64 [V], token id
    to compressed id; pad_id: the compressed id that stands left of the first token and beyond a boundary.
    boundary: "document" stops n-grams at document starts, "stream" only at the left edge of the window.

    Made of these: max_order, the longest n-gram in tokens; num_slots, S, the rows that one token reads in one
    Engram layer; offsets int64 [L, O, K], the first row of each head in the packed table of all Engram
    layers; rows_per_layer, of each layer's packed table; num_rows, of that of all layers: every row id is in
    [0, num_rows).

    Raises AddressingError listing everything that is wrong.
    """

    layers: tuple[int, ...]
    orders: tuple[int, ...]
    heads: int
    multipliers: Int64s
    primes: Int64s
    compression: Int64s
    pad_id: int
    boundary: Boundary
    max_order: int = field(init=False)
    num_slots: int = field(init=False)
    offsets: Int64s = field(init=False)
    rows_per_layer: tuple[int, ...] = field(init=False)
    num_rows: int = field(init=False)

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            raise AddressingError(problems)
        for name in ("multipliers", "primes", "compression"):
            array = np.array(getattr(self, name), dtype=np.int64)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        ends = np.cumsum(self.primes.reshape(-1))
        rows = tuple(int(number) for number in self.primes.sum(axis=(1, 2)))
        derived = {
            "max_order": max(self.orders),
            "num_slots": len(self.orders) * self.heads,
            "offsets": (ends - self.primes.reshape(-1)).reshape(self.primes.shape),
            "rows_per_layer": rows,
            "num_rows": sum(rows),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @classmethod
    def draw(
        cls,
        shape: TableShape,
        compression: npt.ArrayLike,
        pad_id: int,
        boundary: Boundary = "document",
        seed: int = 0,
    ) -> Addressing:
        """The addressing of a new model: multipliers from `seed`, and the first unused primes >=
        rows_per_head.

        compression is int [V]; the rest is as in the class. Raises AddressingError for values that are out of
        range.
        """
        layers, orders, heads, rows_per_head = shape
        problems = [f"rows_per_head={rows_per_head} must be at least 1"] if rows_per_head < 1 else []
        problems += [f"seed={seed} must not be negative"] if seed < 0 else []
        problems += _order_problems(layers, orders, heads)
        table = np.asarray(compression)
        problems += _compression_problems(table, pad_id)
        if problems:
            raise AddressingError(problems)
        vocab = int(table.max()) + 1
        return cls(
            layers=tuple(layers),
            orders=tuple(orders),
            heads=heads,
            multipliers=draw_multipliers(layers, max(orders), vocab, seed),
            primes=draw_primes(len(layers), len(orders), heads, rows_per_head),
            compression=table.astype(np.int64),
            pad_id=pad_id,
            boundary=boundary,
        )

    @cached_property
    def compression_digest(self) -> str:
        """SHA-256 of the compression map as little-endian int64; another map would change every address."""
        return hashlib.sha256(self.compression.astype("<i8").tobytes()).hexdigest()

    def to_json(self) -> str:
        """All but the compression map itself, which is named by its digest; `from_json` reads it back."""
        return json.dumps(
            {
                "format": FORMAT,
                "layers": self.layers,
                "orders": self.orders,
                "heads": self.heads,
                "multipliers": self.multipliers.tolist(),
                "primes": self.primes.tolist(),
                "pad_id": self.pad_id,
                "boundary": self.boundary,
                "compression_sha256": self.compression_digest,
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str, compression: npt.ArrayLike) -> Addressing:
        """The addressing stored in `text`, with the compression map int [V] that it was made for.

        `compression_sha256` may be left out of a file written by hand from published numbers; where it is
        given, it must match. Raises AddressingError listing every missing or unknown key, wrong shape, bad
        multiplier or modulus, and a wrong map.
        """
        tree = _parse(text)
        arrays, problems = {}, []
        for name in ("multipliers", "primes"):
            try:
                # of Python integers: int64 where they fit, of floats or ragged lists: not
                arrays[name] = np.array(tree[name])
            except ValueError:
                arrays[name] = np.empty(0)
            if arrays[name].dtype != np.int64:
                problems.append(f"{name} is not a regular array of 64-bit integers")
        if problems:
            raise AddressingError(problems)
        out = cls(
            layers=tree["layers"],
            orders=tree["orders"],
            heads=tree["heads"],
            compression=cast(Int64s, np.asarray(compression)),
            pad_id=tree["pad_id"],
            boundary=tree["boundary"],
            **arrays,
        )
        stored = tree.get("compression_sha256", out.compression_digest)
        if stored != out.compression_digest:
            given = out.compression_digest
            raise AddressingError(
                [f"made for another token compression: sha256 {stored} is stored, the map given has {given}"]
            )
        return out


def draw_multipliers(layers: Sequence[int], max_order: int, compressed_vocab: int, seed: int) -> Int64s:
    """int64 [L, max_order]: odd multipliers so small that (compressed id) * multiplier never overflows 63
    bits.

    Depends on a layer's own id only, so adding an Engram layer leaves the others' multipliers alone.
    """
    half = max(1, _INT64_MAX // compressed_vocab // 2)
    rows = [
        np.random.default_rng(seed + _LAYER_STRIDE * layer).integers(0, half, size=max_order, dtype=np.int64)
        for layer in layers
    ]
    return np.stack(rows) * 2 + 1


def draw_primes(num_layers: int, num_orders: int, heads: int, rows_per_head: int) -> Int64s:
    """int64 [L, O, K]: the first L * O * K primes >= rows_per_head, rising along layers, then orders, then
    heads.
    """
    primes: list[int] = []
    for _ in range(num_layers * num_orders * heads):
        primes.append(next_prime(primes[-1] + 1 if primes else rows_per_head))
    return np.array(primes, dtype=np.int64).reshape(num_layers, num_orders, heads)


def _parse(text: str) -> dict[str, Any]:
    """The stored tree with lists of numbers as tuples; raises AddressingError where keys or their types are
    wrong.
    """
    if len(text) > _MAX_TEXT:
        raise AddressingError([f"is longer than {_MAX_TEXT:,} characters"])
    try:
        tree = json.loads(text)
    # no JSON, a number of thousands of digits, lists in lists in lists
    except (ValueError, RecursionError) as error:
        raise AddressingError([f"is not JSON: {error}"]) from None
    if not isinstance(tree, dict):
        raise AddressingError(["is not JSON object"])
    problems = [f'key "{key}" is missing' for key in _KEYS if key not in tree]
    problems += [
        f'key "{key}" is unknown' for key in tree if key not in (*_KEYS, "format", "compression_sha256")
    ]
    if tree.get("format", FORMAT) != FORMAT:
        problems.append(f"format {tree['format']} is not known here; this version reads format {FORMAT}")
    for key in ("layers", "orders"):
        value = tree.get(key, [])
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            problems.append(f"{key}={json.dumps(value)} is not a list of integers")
        else:
            tree[key] = tuple(value)
    problems += [
        f"{key}={json.dumps(tree[key])} is not an integer"
        for key in ("heads", "pad_id")
        if key in tree and type(tree[key]) is not int
    ]
    if problems:
        raise AddressingError(problems)
    return tree


def _problems(a: Addressing) -> list[str]:
    """Everything that is wrong with an addressing, one line each."""
    out = _order_problems(a.layers, a.orders, a.heads)
    if a.boundary not in ("document", "stream"):
        out.append(f'boundary={a.boundary!r} must be "document" or "stream"')
    out += _compression_problems(np.asarray(a.compression), a.pad_id)
    shape = (len(a.layers), max(a.orders, default=0))
    if a.multipliers.shape != shape:
        out.append(
            f"multipliers have shape {list(a.multipliers.shape)}, must be [layers, max order] = {list(shape)}"
        )
    bad = [int(m) for m in a.multipliers.reshape(-1) if m <= 0 or m % 2 == 0]
    out += [f"multiplier {m} must be odd and positive" for m in bad]
    shape_primes = (len(a.layers), len(a.orders), a.heads)
    if a.primes.shape != shape_primes:
        out.append(
            f"primes have shape {list(a.primes.shape)}, must be [layers, orders, heads] = "
            f"{list(shape_primes)}"
        )
    moduli = [int(p) for p in a.primes.reshape(-1)]
    uses = Counter(moduli)
    out += [f"modulus {p} is not prime" for p in uses if not is_prime(p)]
    out += [
        f"modulus {p} is used {count} times; every head needs its own"
        for p, count in uses.items()
        if count > 1
    ]
    return out


def _order_problems(layers: Sequence[int], orders: Sequence[int], heads: int) -> list[str]:
    out = []
    if not layers or list(layers) != sorted(set(layers)) or min(layers) < 0:
        out.append(f"layers={list(layers)} must be rising layer ids from 0 on, e.g. [1, 14]")
    if not orders or list(orders) != sorted(set(orders)) or min(orders) < 1:
        out.append(f"orders={list(orders)} must be rising n-gram lengths, e.g. [2, 3]")
    if heads < 1:
        out.append(f"heads={heads} must be at least 1")
    return out


def _compression_problems(compression: npt.NDArray[Any], pad_id: int) -> list[str]:
    if compression.ndim != 1 or compression.size == 0 or not np.issubdtype(compression.dtype, np.integer):
        return [
            f"compression must be a list of integers, one a token; got {compression.dtype} of shape "
            f"{list(compression.shape)}"
        ]
    out = []
    if int(compression.min()) < 0:
        out.append(f"compression holds the negative id {int(compression.min())}")
    if not 0 <= pad_id <= int(compression.max()):
        out.append(f"pad_id={pad_id} is not a compressed id; it may be 0 to {int(compression.max())}")
    return out
