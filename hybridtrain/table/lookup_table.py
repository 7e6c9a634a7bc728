"""The lookup table of a run as this rank holds it: its rows, its row optimizer, and the exchange that serves
the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridtrain.data.batches import Batch
from hybridtrain.kernels.engram_hash.addressing import Addressing
from hybridtrain.kernels.engram_hash.op import row_ids
from hybridtrain.kernels.rows.op import row_gather
from hybridtrain.model.engram import StepRows
from hybridtrain.parallel.early_rows import EarlyRowExchange, OverlapPlanner
from hybridtrain.parallel.mesh import Mesh
from hybridtrain.parallel.row_exchange import CommDtypes, RowExchange, RowPlan, RowPlanner, StepPlan
from hybridtrain.settings.tree import Settings
from hybridtrain.table.fetch_ahead import FetchAhead
from hybridtrain.table.table_state import TableState


class LookupTable(TableState):
    """Rows `low` to `high-1` of the packed table of all Engram layers, and everything that a step does with
    them.

    A step calls `plan` (ahead, in the background), then for each of the plan's exchanges `fetch` before the
    forward passes of its micro-batches, `fetch_ahead` for the exchange after it, and `push` after their
    backward passes, then `exchange.reduce_replicas` and `update`. Table and row state lie on
    `mesh.table_device`; rows and gradients are on the model's device from `fetch` to `update`.

    leaves: the rows of the step under way, which the model reads
    """

    exchange: RowExchange

    def __init__(
        self,
        settings: Settings,
        addressing: Addressing,
        mesh: Mesh,
        leaves: StepRows,
        layers: Sequence[int],
        positions: Tensor | None = None,
    ) -> None:
        """`layers` are the Engram layers of this rank's part of the model, which alone it plans for; there
        may be none. `positions`: under cp, the places in the sequence of this rank's tokens.
        """
        super().__init__(settings, addressing, mesh, leaves.backends)
        engram = settings.engram
        self._columns = [addressing.layers.index(layer) for layer in layers]
        self.leaves, self.positions, self.mode = leaves, positions, engram.fetch
        groups = (mesh.mem, mesh.mem_replicate)
        wires = CommDtypes(engram.wire, engram.wire_gradients, leaves.backends)
        how = (mesh.device, engram.checksum, wires)
        if engram.fetch == "step":
            self.exchange = RowExchange(self.weight, groups, *how)
        else:
            early = EarlyRowExchange(self.weight, groups, mesh.own_group("mem", "mem_ahead"), *how)
            self.exchange, self._ahead = early, FetchAhead(engram.fetch, early, self.optimizer, self.low)
        planner = OverlapPlanner if engram.fetch == "overlap" else RowPlanner

        def make(kind: type[RowPlanner], name: str, exchange_groups: int) -> RowPlanner:
            between, checksum = mesh.planning_groups(name), engram.checksum
            return kind(self.bounds, between, mesh.device, exchange_groups, checksum, mesh.table_device)

        self._planners = make(planner, "plan", engram.exchange_groups), make(RowPlanner, "eval_plan", 1)

    def plan(self, batch: Batch, evaluate: bool = False) -> StepPlan:
        """Which rows the batch needs, from whom; collective, from tokens alone. A rank of `tp` takes its own
        slots only.

        Evaluation has its own groups, so that it may plan in the main thread while training plans ahead in
        another.
        """
        # of whole sequences: n-grams reach over the borders of cp
        ids = row_ids(self.addressing, batch.tokens, batch.starts)
        if self.positions is not None:
            ids = ids.index_select(2, self.positions)
        if len(self._columns) < len(self.addressing.layers):
            ids = ids[..., self._columns, :]
        ids = ids.chunk(self.mesh.tp.size, -1)[self.mesh.tp.rank]
        return self._planners[evaluate].plan(ids)

    def fetch(self, plan: StepPlan, exchange: RowPlan) -> None:
        """Bring the exchange's rows, or those that did not come ahead, and give each micro-batch its leaf,
        numbered from 0.
        """
        self.optimizer.catch_up(plan.touched_N)
        rows_UD = self._ahead.take(exchange) if self._ahead is not None else None
        if rows_UD is None:
            rows_UD = self.exchange.fetch(exchange)
        self.leaves.set([row_gather(rows_UD, select, self.leaves.backends) for select in exchange.select])

    def fetch_ahead(self, plan: StepPlan, number: int, next_plan: StepPlan | None, lr: float) -> None:
        """Begin to bring the rows of the exchange after the plan's `number`-th (from 1), beside what the step
        computes on; see `FetchAhead.begin`.
        """
        if self._ahead is not None:
            self._ahead.begin(plan, number, next_plan, lr)

    def resume(self, plan: StepPlan | None) -> None:
        """Send the first step's rows as the run that wrote the checkpoint had read them, one update early
        (mode "stale").
        """
        if self._ahead is not None and plan is not None:
            self._ahead.resume(plan)

    def hidden_seconds(self) -> float:
        """How long exchanges ran beside the computation since the last call; on CUDA the device must have
        come so far.
        """
        return self._ahead.hidden_seconds() if self._ahead is not None else 0.0

    def forget_ahead(self) -> None:
        """Drop rows that came ahead of an update which is then not made; the next `fetch` brings all rows."""
        if self._ahead is not None:
            self._ahead.forget()

    def push(self, exchange: RowPlan, total_ND: Tensor) -> None:
        """Return the leaves' gradients to the rows' owners, added to `total_ND`, and let go of the leaves."""
        grads = self.leaves.grads()
        grad_UD = grads[0].new_zeros(exchange.num_rows, grads[0].shape[1])
        for select, grad in zip(exchange.select, grads, strict=True):
            # each row at most once per micro-batch, so the order is fixed
            grad_UD.index_add_(0, select, grad)
        self.leaves.clear()
        self.exchange.push(exchange, grad_UD, total_ND)

    def new_gradient(self, plan: StepPlan) -> Tensor:
        """Zeros for the step's touched rows: `[N, head_dim]`, never table-sized."""
        shape = (len(plan.touched_N), self.weight.shape[1])
        return torch.zeros(shape, dtype=torch.float32, device=self.mesh.device)

    def update(self, plan: StepPlan, grad_ND: Tensor, lr: float) -> None:
        self.optimizer.step(plan.touched_N, grad_ND.to(self.weight.device), lr)
