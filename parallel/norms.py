"""The global gradient norm over every shard of every parameter and the table, each counted once, and clipping by it."""

from __future__ import annotations

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


def clip_by_global_norm(
    grads: list[Tensor],
    rows_ND: Tensor | None,
    mesh: Mesh,
    bound: float,
    held_by: Sequence[int] | None = None,
    copies: Sequence[Tensor] = (),
) -> tuple[float, float]:
    """Scale all gradients in place so that their global L2 norm is at most `bound` (0: only measure).

    `grads` are this rank's parts of the backbone, which its dp_replicate copies hold too, and of each as many ranks of tp as
    `held_by` says (None: one); `rows_ND` is the gradient of this rank's touched rows, which every replica of the table
    holds. `copies` are gradients that another pipeline stage counts: they are scaled only. Returns (global norm, table's
    norm), in float64.
    """
    squares = torch.zeros(2, dtype=torch.float64)
    if grads:
        times = torch.tensor(held_by or [1] * len(grads), dtype=torch.float64) * mesh.layout.dp_replicate
        squares[0] = (_squares(grads).cpu() / times).sum()
    if rows_ND is not None:
        squares[1] = _squares([rows_ND]).cpu()[0] / mesh.mem_replicate.size
    backbone, table = all_reduce_(squares.to(mesh.device), mesh.world).tolist()
    norm = (backbone + table) ** 0.5
    if bound > 0 and norm > bound:
        torch._foreach_mul_([*grads, *copies, *([] if rows_ND is None else [rows_ND])], bound / (norm + 1e-6))
    return norm, table**0.5


def _squares(tensors: list[Tensor]) -> Tensor:
    """The squared L2 norm of each tensor, in float64.

    On the CPU by way of its rows: a norm of all at once runs there on one core and in one float32 sum, 6e-4 off for 16 M elements.
    """
    if tensors[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(tensors)).double().square()
    rows = [torch.linalg.vector_norm(t, dim=-1).double() for t in tensors]
    return torch.stack([row.square().sum() for row in rows])
