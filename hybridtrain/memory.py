"""The lookup table of a run as this rank holds it: its rows, its row optimizer, and the exchange that serves the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from hybridtrain.data.batches import Batch
from hybridtrain.kernels.engram_hash.addressing import Addressing
from hybridtrain.kernels.engram_hash.op import row_ids
from hybridtrain.model.init import init_table
from hybridtrain.model.rows import StepRows
from hybridtrain.optim.rowwise import make_row_optimizer
from hybridtrain.parallel.mesh import Mesh
from hybridtrain.parallel.rows import RowExchange, RowPlan, RowPlanner, StepPlan
from hybridtrain.parallel.schedule import MicroBatches
from hybridtrain.settings import Settings


class TableMemory:
    """Rows `low` to `high-1` of the packed table of all memory layers, and everything that a step does with them.

    A step calls `plan` (ahead, in the background), then for each of the plan's exchanges `fetch` before the forward passes
    of its micro-batches and `push` after their backward passes, then `reduce` and `update`.
    """

    def __init__(
        self,
        settings: Settings,
        addressing: Addressing,
        mesh: Mesh,
        rows: StepRows,
        layers: Sequence[int],
        positions: Tensor | None = None,
    ) -> None:
        """`layers` are the memory layers of this rank's part of the model, which alone it plans for; there may be none."""
        memory = settings.memory
        self._columns = [addressing.layers.index(layer) for layer in layers]
        self.addressing, self.mesh, self.rows, self.positions = addressing, mesh, rows, positions
        bounds = mesh.layout.row_bounds(addressing.num_rows)
        self.low, self.high = bounds[mesh.mem.rank], bounds[mesh.mem.rank + 1]
        self.table = init_table(settings.run.seed, self.low, self.high, memory.head_dim, memory.init_std).to(mesh.device)
        self.optimizer = make_row_optimizer(memory, self.table)
        self.exchange = RowExchange(self.table, mesh.mem, mesh.mem_replicate, memory.checksum)
        self._planners = {
            name: RowPlanner(bounds, *mesh.planning_groups(name), mesh.device, exchange_groups=groups, checksum=memory.checksum)
            for name, groups in (("plan", memory.exchange_groups), ("eval_plan", 1))
        }

    def plan(self, batch: Batch, evaluate: bool = False) -> StepPlan:
        """Which rows the batch needs, from whom; collective, from tokens alone. A rank of `tp` takes its own slots only.

        Evaluation has its own groups, so that it may plan in the main thread while training plans ahead in another.
        """
        ids = row_ids(self.addressing, batch.tokens, batch.starts)  # of whole sequences: n-grams reach over the borders of cp
        if self.positions is not None:
            ids = ids.index_select(2, self.positions)
        if len(self._columns) < len(self.addressing.layers):
            ids = ids[..., self._columns, :]
        ids = ids.chunk(self.mesh.tp.size, -1)[self.mesh.tp.rank]
        return self._planners["eval_plan" if evaluate else "plan"].plan(ids)

    def fetch(self, plan: StepPlan, exchange: RowPlan) -> None:
        """Bring the exchange's rows and give each of its micro-batches its leaf, numbered from 0."""
        self.optimizer.catch_up(plan.touched_N)
        rows_UD = self.exchange.fetch(exchange)
        self.rows.set([rows_UD.index_select(0, select) for select in exchange.select])

    def push(self, exchange: RowPlan, total_ND: Tensor) -> None:
        """Return the leaves' gradients to the rows' owners, added to `total_ND`, and let go of the leaves."""
        grads = self.rows.grads()
        grad_UD = grads[0].new_zeros(exchange.num_rows, grads[0].shape[1])
        for select, grad in zip(exchange.select, grads, strict=True):
            grad_UD.index_add_(0, select, grad)  # each row at most once per micro-batch, so the order is fixed
        self.rows.clear()
        self.exchange.push(exchange, grad_UD, total_ND)

    def new_gradient(self, plan: StepPlan) -> Tensor:
        """Zeros for the step's touched rows: `[N, head_dim]`, never table-sized."""
        return torch.zeros(len(plan.touched_N), self.table.shape[1], dtype=torch.float32, device=self.table.device)

    def update(self, plan: StepPlan, grad_ND: Tensor, lr: float) -> None:
        self.optimizer.step(plan.touched_N, grad_ND, lr)

    def state(self) -> dict[str, Tensor]:
        """Table and row state as logical tensors over all owners, for checkpoints."""
        return {"table": self._logical(self.table), **{f"rows.{k}": self._logical(v) for k, v in self.optimizer.state.items()}}

    def scalars(self) -> dict[str, Any]:
        return self.optimizer.scalars()

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        self.optimizer.load_scalars(scalars)

    def _logical(self, local: Tensor) -> Tensor:
        mesh = self.mesh.memory_mesh
        if mesh is None:
            return local
        shape = torch.Size((self.addressing.num_rows, *local.shape[1:]))
        # cut along dim 0, so the whole has the strides of the part
        return DTensor.from_local(local, mesh, [Replicate(), Shard(0)], run_check=False, shape=shape, stride=local.stride())


def by_exchange(batch: Batch, plan: StepPlan | None, device: torch.device) -> list[tuple[RowPlan | None, MicroBatches]]:
    """The batch on the device, cut into the micro-batches that each of the plan's exchanges serves."""
    exchanges: Sequence[RowPlan | None] = plan.exchanges if plan is not None else [None]
    whole = (batch.tokens, batch.starts.cumsum(-1), batch.targets)
    tokens, documents, targets = (t.to(device).chunk(len(exchanges)) for t in whole)
    return [
        (exchange, MicroBatches(tokens[i], documents[i], targets[i], exchange.index if exchange is not None else None))
        for i, exchange in enumerate(exchanges)
    ]
