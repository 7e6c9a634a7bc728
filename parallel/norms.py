"""The global gradient norm over every shard of every parameter and the table, each counted once, and clipping by it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hybridtrain.parallel.collectives import Group, all_reduce_
from hybridtrain.parallel.mesh import Mesh


def local_gradients(params: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of every gradient that exists."""
    grads = [p.grad for p in params if p.grad is not None]
    return [g.to_local() if isinstance(g, DTensor) else g for g in grads]


def sum_over_tp(params: Iterable[Tensor], tp: Group) -> None:
    """Add up, in one collective, the gradients of the parameters that every rank of `tp` holds whole and uses on its own tokens."""
    if tp.size == 1:
        return
    grads = local_gradients(p for p in params if _is_copied(p))
    if not grads:
        return
    flat = all_reduce_(torch.cat([grad.flatten() for grad in grads]), tp)
    for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(total.view_as(grad))


def tp_copies(params: Iterable[Tensor], tp: Group) -> list[int]:
    """How many ranks of `tp` hold the same part, for each gradient of `local_gradients`."""
    return [tp.size if _is_copied(p) else 1 for p in params if p.grad is not None]


def _is_copied(param: Tensor) -> bool:
    """Whether neither tp nor the fold of the experts cuts the parameter: it then lies on the data-parallel ranks alone."""
    names = param.device_mesh.mesh_dim_names or () if isinstance(param, DTensor) else ()
    return not {"tp", "edp"} & set(names)


def global_squares(grads: list[Tensor], rows_ND: Tensor | None, mesh: Mesh, held_by: Sequence[int] | None = None) -> Tensor:
    """The squared L2 norms of all gradients over all ranks: of the backbone and of the table's rows, `[2]` float64 on the device.

    `grads` are this rank's parts of the backbone, which its dp_replicate copies hold too, and of each as many ranks of tp as
    `held_by` says (None: one); `rows_ND` is the gradient of this rank's touched rows, which every replica of the table
    holds. The host does not wait for the result.
    """
    squares = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    if grads:
        times = _times_counted(tuple(held_by or [1] * len(grads)), mesh.layout.dp_replicate, grads[0].device)
        squares[0] = (_squares(grads) / times).sum()
    if rows_ND is not None:
        squares[1] = _squares([rows_ND])[0] / mesh.mem_replicate.size
    return all_reduce_(squares, mesh.world)


def norms_of(squares: Sequence[float]) -> tuple[float, float]:
    """(global norm, table's norm) of the two numbers that `global_squares` gave."""
    backbone, table = squares
    return (backbone + table) ** 0.5, table**0.5


def clip_(grads: Sequence[Tensor], norm: float, bound: float) -> None:
    """Scale all gradients in place so that a global norm of `norm` becomes at most `bound` (0: leave them)."""
    if bound > 0 and norm > bound:
        torch._foreach_mul_(list(grads), bound / (norm + 1e-6))


@functools.lru_cache(maxsize=8)  # the same in every step; an upload would wait for the device
def _times_counted(held_by: tuple[int, ...], replicas: int, device: torch.device) -> Tensor:
    """On how many ranks each gradient is counted: [gradients] float64."""
    return torch.tensor(held_by, dtype=torch.float64, device=device) * replicas


def _squares(tensors: list[Tensor]) -> Tensor:
    """The squared L2 norm of each tensor, in float64.

    On the CPU by way of its rows: a norm of all at once runs there on one core and in one float32 sum, 6e-4 off for 16 M elements.
    """
    if tensors[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(tensors)).double().square()
    rows = [torch.linalg.vector_norm(t, dim=-1).double() for t in tensors]
    return torch.stack([row.square().sum() for row in rows])
