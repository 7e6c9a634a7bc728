"""The lookup table of a run as this rank holds it: its rows, its row optimizer, and the exchange that serves
the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from hybridtrain.data.batches import Batch
from hybridtrain.kernels.engram_hash.addressing import Addressing
from hybridtrain.kernels.engram_hash.op import row_ids
from hybridtrain.kernels.row_gather.op import row_gather
from hybridtrain.model.engram import StepRows
from hybridtrain.model.init import init_table
from hybridtrain.optim.rowwise import make_row_optimizer
from hybridtrain.parallel.async_all_to_all import Handle
from hybridtrain.parallel.mesh import Mesh
from hybridtrain.parallel.row_exchange import (
    AllToAllSplits,
    CommDtypes,
    RowExchange,
    RowPlan,
    RowPlanner,
    RowsInFlight,
    StepPlan,
)
from hybridtrain.settings.tree import Settings
from hybridtrain.table.saved_rows import SavedRows


@dataclass(frozen=True)
class Ahead:
    """The next exchange, under way."""

    exchange: RowPlan
    arrival: RowsInFlight
    stale: SavedRows | None  # in stale mode: what this owner's rows were when they were read


class LookupTable:
    """Rows `low` to `high-1` of the packed table of all memory layers, and everything that a step does with
    them.

    A step calls `plan` (ahead, in the background), then for each of the plan's exchanges `fetch` before the
    forward passes of its micro-batches, `fetch_ahead` for the exchange after it, and `push` after their
    backward passes, then `reduce` and `update`. Table and row state lie on `mesh.table_device`; rows and
    gradients are on the model's device from `fetch` to `update`.
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
        """`layers` are the memory layers of this rank's part of the model, which alone it plans for; there
        may be none.
        """
        engram = settings.engram
        self._columns = [addressing.layers.index(layer) for layer in layers]
        self.addressing, self.mesh, self.rows, self.positions = addressing, mesh, rows, positions
        bounds = mesh.layout.row_bounds(addressing.num_rows)
        self.low, self.high = bounds[mesh.mem.rank], bounds[mesh.mem.rank + 1]
        rows_here = init_table(settings.run.seed, self.low, self.high, engram.head_dim, engram.init_std)
        self.table = rows_here.to(mesh.table_device, getattr(torch, engram.dtype))
        self.optimizer = make_row_optimizer(engram, self.table, settings.run.seed, self.low)
        self.mode = engram.fetch
        ahead = mesh.own_mem_group("ahead") if self.mode != "step" else None
        wires = CommDtypes(engram.wire, engram.wire_gradients)
        self.exchange = RowExchange(
            self.table, mesh.mem, mesh.mem_replicate, engram.checksum, mesh.device, ahead, wires
        )
        self._planners = {
            name: RowPlanner(
                bounds,
                *mesh.planning_groups(name),
                mesh.device,
                exchange_groups=groups,
                checksum=engram.checksum,
                table_device=mesh.table_device,
                ahead=overlap,
            )
            for name, groups, overlap in (
                ("plan", engram.exchange_groups, self.mode == "overlap"),
                ("eval_plan", 1, False),
            )
        }
        self._ahead: Ahead | None = None
        self._saved: list[SavedRows] | None = None
        self._arrived: list[Handle] = []

    def plan(self, batch: Batch, evaluate: bool = False) -> StepPlan:
        """Which rows the batch needs, from whom; collective, from tokens alone. A rank of `tp` takes its own
        slots only.

        Evaluation has its own groups, so that it may plan in the main thread while training plans ahead in
        another.
        """
        ids = row_ids(
            self.addressing, batch.tokens, batch.starts
        )  # of whole sequences: n-grams reach over the borders of cp
        if self.positions is not None:
            ids = ids.index_select(2, self.positions)
        if len(self._columns) < len(self.addressing.layers):
            ids = ids[..., self._columns, :]
        ids = ids.chunk(self.mesh.tp.size, -1)[self.mesh.tp.rank]
        return self._planners["eval_plan" if evaluate else "plan"].plan(ids)

    def fetch(self, plan: StepPlan, exchange: RowPlan) -> None:
        """Bring the exchange's rows, or what of them did not come ahead, and give each micro-batch its leaf,
        numbered from 0.
        """
        self.optimizer.catch_up(plan.touched_N)
        if self._ahead is not None and self._ahead.exchange is exchange:
            rows_UD = self.exchange.complete(exchange, self._ahead.arrival)
            self._arrived.append(self._ahead.arrival.pending)
            self._ahead = None
        else:
            rows_UD = self.exchange.fetch(exchange)
        self.rows.set([row_gather(rows_UD, select) for select in exchange.select])

    def fetch_ahead(self, plan: StepPlan, number: int, next_plan: StepPlan | None, lr: float) -> None:
        """Begin to bring the rows of the exchange after the plan's `number`-th (from 1), beside what the step
        computes on.

        `engram.fetch` "overlap" takes the rows that no update changes until then, but for the decay of the
        coming one at rate `lr`, which it applies to them; "stale" takes all of the next step's as they are.
        Rows are read here and now, before anything writes to the table.
        """
        if self.mode == "step":
            return
        if number < len(plan.exchanges):  # of the same step, so no update lies between
            exchange = plan.exchanges[number]
            self._begin(exchange, exchange, self.optimizer.values(exchange.wanted_Q))
        elif next_plan is not None:
            if next_plan.number != plan.number + 1:
                raise ValueError(f"plan {next_plan.number} does not follow plan {plan.number}")
            exchange = next_plan.exchanges[0]
            if self.mode == "stale":
                self._begin_stale(next_plan, self.optimizer.values(next_plan.touched_N))
            elif exchange.early is not None:
                self._begin(exchange, exchange.early, self.optimizer.values(exchange.early.wanted_Q, lr))

    def resume(self, plan: StepPlan | None) -> None:
        """Send the first step's rows as the run that wrote the checkpoint had read them, one update early
        (stale mode).
        """
        if self._saved is None or plan is None:
            return
        values_ND = self.optimizer.values(plan.touched_N)
        for piece in self._saved:
            piece.write_over(plan.touched_N + self.low, values_ND)
        self._saved = None
        self._begin_stale(plan, values_ND)

    def _begin(
        self, exchange: RowPlan, route: AllToAllSplits, rows_QD: Tensor, stale: SavedRows | None = None
    ) -> None:
        self._ahead = Ahead(exchange, self.exchange.begin(route, rows_QD), stale)

    def _begin_stale(self, plan: StepPlan, values_ND: Tensor) -> None:
        (exchange,) = plan.exchanges
        rows_QD = row_gather(self.exchange.upload(values_ND), exchange.slot_Q)
        self._begin(exchange, exchange, rows_QD, SavedRows(plan.touched_N + self.low, values_ND))

    def hidden_seconds(self) -> float:
        """How long exchanges ran beside the computation since the last call; on CUDA the device must have
        come so far.
        """
        seconds, self._arrived = sum(pending.hidden_seconds() for pending in self._arrived), []
        return seconds

    def forget_ahead(self) -> None:
        """Let go of rows that came ahead of an update which is then not made; the next `fetch` brings them
        all.
        """
        if self._ahead is not None:
            self._ahead.arrival.wait()
            self._ahead = None

    def push(self, exchange: RowPlan, total_ND: Tensor) -> None:
        """Return the leaves' gradients to the rows' owners, added to `total_ND`, and let go of the leaves."""
        grads = self.rows.grads()
        grad_UD = grads[0].new_zeros(exchange.num_rows, grads[0].shape[1])
        for select, grad in zip(exchange.select, grads, strict=True):
            grad_UD.index_add_(
                0, select, grad
            )  # each row at most once per micro-batch, so the order is fixed
        self.rows.clear()
        self.exchange.push(exchange, grad_UD, total_ND)

    def new_gradient(self, plan: StepPlan) -> Tensor:
        """Zeros for the step's touched rows: `[N, head_dim]`, never table-sized."""
        return torch.zeros(
            len(plan.touched_N), self.table.shape[1], dtype=torch.float32, device=self.mesh.device
        )

    def update(self, plan: StepPlan, grad_ND: Tensor, lr: float) -> None:
        self.optimizer.step(plan.touched_N, grad_ND.to(self.table.device), lr)

    def state(self) -> dict[str, Tensor]:
        """Table and row state as logical tensors over all owners, for checkpoints; in stale mode also the
        rows read ahead.
        """
        return self.logical_rows() | self.stale_state()

    def logical_rows(self) -> dict[str, Tensor]:
        """`row_tensors` as parts of the whole table's."""
        return {name: self._logical(value) for name, value in self.row_tensors().items()}

    def row_tensors(self) -> dict[str, Tensor]:
        """The local rows and their state, each with the rows as dim 0, by their names in `state`."""
        return {
            "rows": self.table,
            **{f"state.{name}": value for name, value in self.optimizer.state.items()},
        }

    def stale_state(self) -> dict[str, Tensor]:
        """In stale mode the rows read ahead, which nothing writes to any more."""
        ahead = self._ahead
        return ahead.stale.state(self.low, self.high) if ahead is not None and ahead.stale is not None else {}

    def load_stale(self, pieces: Sequence[SavedRows]) -> None:
        """Take over what `stale_state` gave, from all owners that had rows of this one's."""
        device = self.table.device
        self._saved = [
            SavedRows(piece.numbers.to(device), piece.values.to(device)) for piece in pieces
        ] or None

    def scalars(self) -> dict[str, Any]:
        return self.optimizer.scalars()

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        self.optimizer.load_scalars(scalars)

    def _logical(self, local: Tensor) -> Tensor:
        mesh = self.mesh.memory_mesh
        if mesh is None:
            return local
        shape = torch.Size((self.addressing.num_rows, *local.shape[1:]))
        placements = [Shard(0) if axis == "mem" else Replicate() for axis in self.mesh.layout.memory_axes]
        # cut along dim 0, so the whole has the strides of the part
        return DTensor.from_local(
            local, mesh, placements, run_check=False, shape=shape, stride=local.stride()
        )
