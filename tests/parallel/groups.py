"""Layouts, and meshes for the distributed tests; those are made on a rank that run_on_ranks started."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybridtrain.parallel.engine import clip_, global_squares, norms_of
from hybridtrain.parallel.layout import Degrees, Layout
from hybridtrain.parallel.mesh import Mesh, make_mesh


def resolve(world: int, **degrees: Any) -> Layout:
    return Layout.resolve(world, Degrees(**degrees))


def mesh_here(**degrees: Any) -> Mesh:
    """A mesh of this world's ranks on the CPU."""
    return make_mesh(
        resolve(dist.get_world_size(), **degrees),
        dist.get_rank(),
        torch.device("cpu"),
        timeout=60,
    )


def clip_by_global_norm(
    grads: list[Tensor], rows: Tensor | None, mesh: Mesh, bound: float, held_by: list[int] | None = None
) -> tuple[float, float]:
    """What an engine and the training loop do with a step's gradients together."""
    times = [n * mesh.layout.dp_replicate for n in held_by or [1] * len(grads)]
    norm, table = norms_of(global_squares(grads, rows, mesh, times).tolist())
    clip_([*grads, *([] if rows is None else [rows])], norm, bound)
    return norm, table
