"""Rows that are fetched before their step (`engram.fetch` "overlap" and "stale"), beside the computation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hybridtrain.kernels.rows.op import row_gather
from hybridtrain.optim.row_optimizer import RowOptimizer
from hybridtrain.parallel.async_all_to_all import Handle
from hybridtrain.parallel.early_rows import EarlyRowExchange, RowsInFlight
from hybridtrain.parallel.row_exchange import AllToAllSplits, RowPlan, StepPlan
from hybridtrain.settings.engram import FetchAheadMode
from hybridtrain.table.saved_rows import SavedRows


@dataclass(frozen=True)
class _UnderWay:
    """The next exchange. `read`: in mode "stale", what this owner's rows were when they were read."""

    exchange: RowPlan
    rows: RowsInFlight
    read: SavedRows | None


class FetchAhead:
    """At most one exchange under way: the one after that whose rows the model reads.

    "overlap" takes the rows that no update changes until then, but for the decay of the coming one, which it
    applies to them; "stale" takes all of the next step's rows as they are, one update early. Rows are read
    in `begin`, before anything writes to the table.

    saved: rows that a checkpoint's run had read ahead, until `resume` sends them
    """

    def __init__(
        self,
        mode: FetchAheadMode,
        exchange: EarlyRowExchange,
        optimizer: RowOptimizer,
        low: int,
    ) -> None:
        """`low` is the number of this owner's first row."""
        self.mode, self.exchange, self.optimizer, self.low = mode, exchange, optimizer, low
        self.saved: Sequence[SavedRows] = ()
        self._under_way: _UnderWay | None = None
        self._arrived: list[Handle] = []

    def take(self, exchange: RowPlan) -> Tensor | None:
        """The exchange's rows `[U, D]` where it is the one under way, else None."""
        under_way = self._under_way
        if under_way is None or under_way.exchange is not exchange:
            return None
        rows_UD = self.exchange.complete(exchange, under_way.rows)
        self._arrived.append(under_way.rows.pending)
        self._under_way = None
        return rows_UD

    def begin(self, plan: StepPlan, number: int, next_plan: StepPlan | None, lr: float) -> None:
        """Begin the exchange after the plan's `number`-th (from 1), which may be the first of `next_plan`;
        `lr` is the rate of the update in between.

        Raises ValueError where `next_plan` does not follow `plan`.
        """
        if number < len(plan.exchanges):  # of the same step, so no update lies between
            exchange = plan.exchanges[number]
            self._send(exchange, exchange, self.optimizer.values(exchange.wanted_Q))
        elif next_plan is not None:
            if next_plan.number != plan.number + 1:
                raise ValueError(f"plan {next_plan.number} does not follow plan {plan.number}")
            exchange = next_plan.exchanges[0]
            if self.mode == "stale":
                self._send_all(next_plan, self.optimizer.values(next_plan.touched_N))
            elif exchange.early is not None:
                self._send(exchange, exchange.early, self.optimizer.values(exchange.early.wanted_Q, lr))

    def resume(self, plan: StepPlan) -> None:
        """Send the rows of a resumed run's first step, those of `saved` as they were."""
        if not self.saved:
            return
        values_ND = self.optimizer.values(plan.touched_N)
        for rows in self.saved:
            rows.write_over(plan.touched_N + self.low, values_ND)
        self.saved = ()
        self._send_all(plan, values_ND)

    def forget(self) -> None:
        """Let go of what is under way, once it has arrived."""
        if self._under_way is not None:
            self._under_way.rows.wait()
            self._under_way = None

    @property
    def read_ahead(self) -> SavedRows | None:
        """In mode "stale", the rows under way as they were read."""
        return self._under_way.read if self._under_way is not None else None

    def hidden_seconds(self) -> float:
        """How long exchanges ran beside the computation since the last call."""
        seconds, self._arrived = sum(pending.hidden_seconds() for pending in self._arrived), []
        return seconds

    def _send_all(self, plan: StepPlan, values_ND: Tensor) -> None:
        (exchange,) = plan.exchanges
        rows_QD = row_gather(self.exchange.upload(values_ND), exchange.slot_Q, self.exchange.wires.backends)
        self._send(exchange, exchange, rows_QD, SavedRows(plan.touched_N + self.low, values_ND))

    def _send(
        self, exchange: RowPlan, route: AllToAllSplits, rows_QD: Tensor, read: SavedRows | None = None
    ) -> None:
        self._under_way = _UnderWay(exchange, self.exchange.begin(route, rows_QD), read)
