"""The global gradient norm over every shard of every parameter and the table, each counted once, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hybridtrain.parallel.collectives import all_reduce_
from hybridtrain.parallel.mesh import Mesh


def local_gradients(params: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of every gradient that exists."""
    grads = [p.grad for p in params if p.grad is not None]
    return [g.to_local() if isinstance(g, DTensor) else g for g in grads]


def clip_by_global_norm(
    grads: list[Tensor], rows_ND: Tensor | None, mesh: Mesh, bound: float, copies: Sequence[Tensor] = ()
) -> tuple[float, float]:
    """Scale all gradients in place so that their global L2 norm is at most `bound` (0: only measure).

    `grads` are this rank's parts of the backbone, which only its dp_replicate copies hold too; `rows_ND` is the gradient
    of this rank's touched rows, which every replica of the table holds. `copies` are gradients that another pipeline stage
    counts: they are scaled only. Returns (global norm, table's norm), in float64.
    """
    squares = torch.zeros(2, dtype=torch.float64)
    if grads:
        squares[0] = torch.stack(torch._foreach_norm(grads)).double().square().sum().cpu() / mesh.layout.dp_replicate
    if rows_ND is not None:
        squares[1] = torch.linalg.vector_norm(rows_ND).double().square().cpu() / mesh.mem_replicate.size
    backbone, table = all_reduce_(squares.to(mesh.device), mesh.world).tolist()
    norm = (backbone + table) ** 0.5
    if bound > 0 and norm > bound:
        torch._foreach_mul_([*grads, *copies, *([] if rows_ND is None else [rows_ND])], bound / (norm + 1e-6))
    return norm, table**0.5
