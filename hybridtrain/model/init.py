"""Initial values. Each is drawn from a generator keyed by seed and name, so no layout, order or slicing
changes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import xxhash
from torch import Tensor

from hybridtrain.model.common import CountingModule
from hybridtrain.model.component import Parameter
from hybridtrain.model.lm import HybridLM
from hybridtrain.settings.layers import layer_specs
from hybridtrain.settings.tree import Settings

TABLE_BLOCK = 65_536  # rows of the lookup table that share one generator
ONE_GENERATOR = 1 << 20  # elements of the largest tensor, or expert's part of one, that is drawn in one go
_TILE = (
    1 << 17,
    1024,
)  # of larger ones: the elements that share a generator, and the most columns of a matrix among them

Draw = Callable[..., Tensor]
"""`draw(rows=None, within=())`: the initial value, or a part of it, as a float32 CPU tensor: slices of dim 0
and of the others.
"""


def init_parameters(
    model: HybridLM, settings: Settings, write: Callable[[Tensor, Draw], None] | None = None
) -> None:
    """Fill all parameters and router buffers of a model on a real device, as they are declared.

    `write(param, draw)` puts a parameter's value in place
    (default: copy it whole); a caller with sharded parameters writes `draw(rows, within)`, which costs what
    the part does.
    """
    write = write or _copy
    for name, (parameter, declared) in model.declared_parameters().items():
        shape = tuple(parameter.shape)
        std = _std(declared, settings)
        draw_this = (
            partial(draw, _key(name), shape, settings.run.seed, std)
            if std is not None
            else partial(constant, shape, _constant(declared))
        )
        with torch.no_grad():
            write(parameter, draw_this)
    for module in model.modules():
        if isinstance(module, CountingModule):
            module.reset_buffers()


def _key(name: str) -> str:
    """The key of a parameter's draw: its name, in which an Engram layer is called "memory", as in the first
    versions.

    So runs of every version begin with the same values.
    """
    return name.replace(".engram.", ".memory.")


def _constant(declared: Parameter) -> float:
    """The value of every element of a parameter that is not drawn."""
    values: dict[str | float, float] = {"ones": 1.0, "zeros": 0.0}
    return values.get(declared.init, 0.0) if isinstance(declared.init, str) else declared.init


def _std(declared: Parameter, settings: Settings) -> float | None:
    """Standard deviation of the parameter; None for a constant."""
    if declared.init not in ("normal", "residual"):
        return None
    layers = len(layer_specs(settings))
    return settings.model.init_std / (math.sqrt(2 * layers) if declared.init == "residual" else 1)


def constant(
    shape: tuple[int, ...], value: float, rows: slice | None = None, within: tuple[slice, ...] = ()
) -> Tensor:
    """The slices of a parameter whose elements are all `value`, as `draw` returns them."""
    return torch.full([end - start for start, end in _bounds(shape, rows, within)], value)


def _bounds(
    shape: tuple[int, ...], rows: slice | None, within: tuple[slice, ...]
) -> tuple[tuple[int, int], ...]:
    """Start and end along each dim."""
    cuts = (rows or slice(None), *within)
    part = tuple(cut.indices(size)[:2] for cut, size in zip(cuts, shape, strict=False))
    return part + tuple((0, size) for size in shape[len(part) :])


def draw(
    name: str,
    shape: tuple[int, ...],
    seed: int,
    std: float,
    rows: slice | None = None,
    within: tuple[slice, ...] = (),
) -> Tensor:
    """Initial value of a parameter, or the slices `rows` (step 1) of its dim 0 and `within` of the other
    dims, float32 on the CPU.

    Experts have a generator each, and so have the tiles of what is larger than ONE_GENERATOR: a part costs,
    in time and memory, what it holds and the rest of the tiles that it cuts.
    """
    part = _bounds(shape, rows, within)
    if std == 0:
        return constant(shape, 0.0, rows, within)
    if ".experts." not in name:
        return _normal_part(f"{seed}:{name}", shape, std, part)
    out = torch.empty([end - start for start, end in part])
    for place, expert in enumerate(range(*part[0])):
        out[place] = _normal_part(f"{seed}:{name}:{expert}", shape[1:], std, part[1:])
    return out


def _normal_part(key: str, shape: tuple[int, ...], std: float, part: tuple[tuple[int, int], ...]) -> Tensor:
    """The elements from start to end of each dim, of the tensor that `shape` and `key` stand for."""
    if (
        math.prod(shape) <= ONE_GENERATOR or len(shape) > 2
    ):  # only experts' stacks have three dims, and each is a matrix here
        return _normal(key, shape, std)[tuple(slice(*bounds) for bounds in part)].clone()
    height, width = shape if len(shape) == 2 else (shape[0], 1)
    (top, bottom), (left, right) = part if len(shape) == 2 else (part[0], (0, 1))
    elements, columns = _TILE
    columns = min(columns, width)
    lines = elements // columns
    out = torch.empty(bottom - top, right - left)
    for i in range(top // lines, -(-bottom // lines)):
        for j in range(left // columns, -(-right // columns)):
            line, column = i * lines, j * columns
            tile = _normal(f"{key}:{i}:{j}", (min(lines, height - line), min(columns, width - column)), std)
            low, high, first, last = (
                max(top, line),
                min(bottom, line + lines),
                max(left, column),
                min(right, column + columns),
            )
            out[low - top : high - top, first - left : last - left] = tile[
                low - line : high - line, first - column : last - column
            ]
    return out if len(shape) == 2 else out.flatten()


def init_table(seed: int, start_row: int, end_row: int, dim: int, std: float) -> Tensor:
    """Rows start_row..end_row-1 of the packed lookup table, float32 [rows, dim]; the same rows however it is
    cut.
    """
    out = torch.empty(end_row - start_row, dim)
    for block in range(start_row // TABLE_BLOCK, -(-end_row // TABLE_BLOCK)):
        first = block * TABLE_BLOCK
        low, high = max(start_row, first), min(end_row, first + TABLE_BLOCK)
        values = _normal(f"{seed}:table:{block}", (TABLE_BLOCK, dim), std)
        out[low - start_row : high - start_row] = values[low - first : high - first]
    return out


def _normal(key: str, shape: tuple[int, ...], std: float) -> Tensor:
    generator = torch.Generator().manual_seed(xxhash.xxh64_intdigest(key.encode()) >> 1)
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)


def _copy(parameter: Tensor, draw_this: Draw) -> None:
    parameter.copy_(draw_this())
