"""Initial values. Each is drawn from a generator keyed by seed and name, so no layout, order or slicing changes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import xxhash
from torch import Tensor, nn

from hybridtrain.model.router import Router
from hybridtrain.settings import Settings, layer_specs

TABLE_BLOCK = 65_536  # rows of the lookup table that share one generator

Draw = Callable[..., Tensor]
"""`draw(rows=None)`: the initial value, or a slice of its dim 0, as a float32 CPU tensor."""


def init_parameters(model: nn.Module, settings: Settings, write: Callable[[Tensor, Draw], None] | None = None) -> None:
    """Fill all parameters and router buffers of a model on a real device.

    Norms are ones, the memory's convolution zeros, all else normal with `model.init_std`, scaled by 1/sqrt(2 layers)
    where it writes to the residual stream. `write(param, draw)` puts a parameter's value in place (default: copy it
    whole); a caller with sharded parameters writes `draw(rows=slice)` or a part of `draw()`.
    """
    write = write or _copy
    for name, parameter in model.named_parameters():
        if not name.startswith("rows."):
            draw_this = partial(draw, name, tuple(parameter.shape), settings.run.seed, parameter_std(name, settings))
            with torch.no_grad():
                write(parameter, draw_this)
    for module in model.modules():
        if isinstance(module, Router):
            module.reset_buffers()


def parameter_std(name: str, settings: Settings) -> float | None:
    """Standard deviation of the parameter `name`; 0 for zeros, None for ones."""
    if name.endswith("norm.weight"):
        return None
    if name.endswith(".conv"):
        return 0.0
    writes_residual = name.endswith(("wo.weight", "w_down.weight", "w_down", "memory.wv.weight"))
    return settings.model.init_std / (math.sqrt(2 * len(layer_specs(settings))) if writes_residual else 1)


def draw(name: str, shape: tuple[int, ...], seed: int, std: float | None, rows: slice | None = None) -> Tensor:
    """Initial value of a parameter, or the slice `rows` (step 1) of its dim 0, float32 on the CPU.

    Experts have a generator each, so a slice of them costs only what it holds.
    """
    start, end, _ = (rows or slice(None)).indices(shape[0])
    if std is None or std == 0:
        return torch.full((end - start, *shape[1:]), 1.0 if std is None else 0.0)
    if ".experts." in name:
        experts = [_normal(f"{seed}:{name}:{expert}", shape[1:], std) for expert in range(start, end)]
        return torch.stack(experts) if experts else torch.empty(0, *shape[1:])
    return _normal(f"{seed}:{name}", shape, std)[start:end]


def init_table(seed: int, start_row: int, end_row: int, dim: int, std: float) -> Tensor:
    """Rows start_row..end_row-1 of the packed lookup table, float32 [rows, dim]; the same rows however it is cut."""
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
