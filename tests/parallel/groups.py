"""Meshes for the distributed tests; called on a rank that run_on_ranks started."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from hybridtrain.parallel.layout import Layout
from hybridtrain.parallel.mesh import Mesh, make_mesh


def mesh_here(**degrees: Any) -> Mesh:
    """A mesh of this world's ranks on the CPU."""
    return make_mesh(Layout.resolve(dist.get_world_size(), **degrees), dist.get_rank(), torch.device("cpu"), timeout=60)
