"""One door through which every Triton kernel is launched, so that the report can compile exactly what an op
would launch.

`kernels report` runs the ops' launching functions on meta tensors inside `recording()`: nothing runs, every
launch is kept. This file needs no triton, and no kernel is launched past it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """A kernel with what it is launched on; `traffic` is the bytes it reads and writes in global memory."""

    kernel: Any  # a triton.JITFunction, whose arguments are `arguments` in order, then `constants` by name
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int
    traffic: int


@dataclass(frozen=True)
class Case:
    """A shape of production size at which the report compiles an op: `run` launches it on meta tensors.

    minimum: bytes of the op's inputs and outputs, each once. flops: of matrix products of operands of `bits`.
    bound: what limits it by design. targets: those that can do it (report/hardware.py); none named: all.
    """

    op: str
    shape: str
    run: Callable[[], object]
    minimum: int
    flops: int = 0
    bound: str = "memory"  # or "matrix", or "arithmetic" of other kinds
    targets: tuple[str, ...] = ()
    bits: int = 16


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches inside are kept in the list and do not run."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    constants: Mapping[str, Any],
    num_warps: int = 4,
    num_stages: int = 2,
    traffic: int | None = None,
) -> None:
    """Launch `kernel` on the device of its tensors, or record it; an empty grid is no launch.

    traffic: None where every tensor is read or written once, whole.
    """
    if 0 in grid:
        return
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    if _recorded is not None:
        moved = sum(map(num_bytes, tensors)) if traffic is None else traffic
        _recorded.append(Launch(kernel, arguments, dict(constants), grid, num_warps, num_stages, moved))
        return
    with torch.cuda.device(tensors[0].device) if tensors[0].is_cuda else nullcontext():
        kernel[grid](*arguments, **constants, num_warps=num_warps, num_stages=num_stages)


def num_bytes(*tensors: Tensor) -> int:
    """Bytes of the tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors)


def row_tile(width: int, elements: int = 2048) -> tuple[dict[str, int], int]:
    """Constants BLOCK_N, BLOCK_D of a tile of whole rows of `width`, and its warps.

    Raises ValueError for rows that would not fit into registers.
    """
    block = max(16, 1 << (width - 1).bit_length())
    if block > MAX_WIDTH:
        raise ValueError(f"rows of {width} elements do not fit into one tile; the widest is {MAX_WIDTH}")
    rows = max(1, elements // block)
    return {"BLOCK_N": rows, "BLOCK_D": block}, min(16, max(1, rows * block // 512))


MAX_WIDTH = 16384


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def partials(tiles: int) -> tuple[int, int]:
    """(programs, tiles per program) of a kernel that sums over rows in registers and writes one partial sum
    per program.

    Depends on the shape alone, not on the device, so the order of the sum is the same on every GPU.
    """
    per_program = max(1, ceil_div(tiles, MAX_PROGRAMS))
    return ceil_div(tiles, per_program), per_program


MAX_PROGRAMS = 512
