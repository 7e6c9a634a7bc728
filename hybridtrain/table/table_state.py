"""A table's state in checkpoints: rows, what their optimizer keeps of each, and rows that were read ahead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from hybridtrain.kernels.choose import Backends
from hybridtrain.kernels.engram_hash.addressing import Addressing
from hybridtrain.model.init import init_table
from hybridtrain.optim.row_optimizer import RowOptimizer, make_row_optimizer
from hybridtrain.parallel.mesh import Mesh
from hybridtrain.settings.tree import Settings
from hybridtrain.table.fetch_ahead import FetchAhead
from hybridtrain.table.saved_rows import SavedRows


class TableState:
    """The part of a `LookupTable` that draws, saves and loads its rows.

    weight: the rows here, [high - low, head_dim]
    """

    optimizer: RowOptimizer
    _ahead: FetchAhead | None = None

    def __init__(self, settings: Settings, addressing: Addressing, mesh: Mesh, backends: Backends) -> None:
        engram, seed = settings.engram, settings.run.seed
        self.addressing, self.mesh = addressing, mesh
        self.bounds = mesh.layout.row_bounds(addressing.num_rows)
        self.low, self.high = self.bounds[mesh.mem.rank], self.bounds[mesh.mem.rank + 1]
        rows_here = init_table(seed, self.low, self.high, engram.head_dim, engram.init_std)
        self.weight = rows_here.to(mesh.table_device, getattr(torch, engram.dtype))
        self.optimizer = make_row_optimizer(engram, self.weight, seed, self.low, backends)

    def state(self) -> dict[str, Tensor]:
        """Table and row state as logical tensors over all owners, for checkpoints; in mode "stale" also
        the rows read ahead.
        """
        return self.logical_rows() | self.saved_rows()

    def logical_rows(self) -> dict[str, Tensor]:
        """`row_tensors` as parts of the whole table's."""
        return {name: self._logical(value) for name, value in self.row_tensors().items()}

    def row_tensors(self) -> dict[str, Tensor]:
        """The local rows and their state, each with the rows as dim 0, by their names in `state`."""
        return {
            "rows": self.weight,
            **{f"state.{name}": value for name, value in self.optimizer.state.items()},
        }

    def saved_rows(self) -> dict[str, Tensor]:
        """In mode "stale" the rows read ahead, which nothing writes to any more; else {}."""
        rows = self._ahead.read_ahead if self._ahead is not None else None
        return rows.state(self.low, self.high) if rows is not None else {}

    def load_saved_rows(self, saved: Sequence[SavedRows]) -> None:
        """Take over what `saved_rows` returned on all owners that had rows of this owner."""
        if self._ahead is not None:
            device = self.weight.device
            self._ahead.saved = [SavedRows(s.numbers.to(device), s.values.to(device)) for s in saved]

    def scalars(self) -> dict[str, Any]:
        return self.optimizer.scalars()

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        self.optimizer.load_scalars(scalars)

    def _logical(self, local: Tensor) -> Tensor:
        mesh = self.mesh.mem_mesh
        if mesh is None:
            return local
        shape = torch.Size((self.addressing.num_rows, *local.shape[1:]))
        placements = [Shard(0) if axis == "mem" else Replicate() for axis in self.mesh.layout.mem_axes]
        # cut along dim 0, so the whole has the strides of the part
        return DTensor.from_local(
            local, mesh, placements, run_check=False, shape=shape, stride=local.stride()
        )
