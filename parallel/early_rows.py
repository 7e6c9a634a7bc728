"""Rows that travel before their step, beside the computation: which rows may (plans), and how they travel
(exchange).

Shape legend: see row_exchange.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridtrain.kernels.rows.op import pack
from hybridtrain.parallel.async_all_to_all import begin_all_to_all
from hybridtrain.parallel.checksums import checksums, verify
from hybridtrain.parallel.collectives import Group, all_to_all
from hybridtrain.parallel.row_exchange import (
    AS_THEY_ARE,
    AllToAllSplits,
    CommDtypes,
    PartialExchange,
    RowExchange,
    RowPlan,
    RowPlanner,
    StepPlan,
)


def late_rows(plan: StepPlan) -> int | None:
    """How many of the first exchange's rows the update of the step before changes; None where that was not
    planned.
    """
    late = plan.exchanges[0].late
    return sum(late.send) if late is not None else None


class OverlapPlanner(RowPlanner):
    """Its plans also say which of their rows the step before touches (`late`) and which it does not
    (`early`): owners know, and tell the ranks that ask.
    """

    _touched_before: Tensor | None = None

    def _split(self, first: RowPlan, touched_N: Tensor) -> RowPlan:
        before, self._touched_before = self._touched_before, touched_N
        return self._halves(first, before) if before is not None else first

    def _halves(self, part: RowPlan, touched_N: Tensor) -> RowPlan:
        """The exchange in two: without the rows `touched_N`, and those alone. One byte per row tells the
        asking ranks.
        """
        late_Q = torch.isin(part.wanted_Q, touched_N)
        late_U = all_to_all(late_Q.to(torch.uint8), part.receive, part.send, self.mem).bool()

        def share(here_Q: Tensor, here_U: Tensor) -> PartialExchange:
            send, receive = _true_in_parts(here_U, part.send), _true_in_parts(here_Q, part.receive)
            return PartialExchange(send, receive, part.wanted_Q[here_Q], here_U.nonzero().flatten())

        return replace(part, early=share(~late_Q, ~late_U), late=share(late_Q, late_U))

    def _place(self, part: RowPlan, touched_N: Tensor) -> RowPlan:
        on, at = self.device, self.table_device

        def placed(share: PartialExchange | None) -> PartialExchange | None:
            return share and replace(share, wanted_Q=share.wanted_Q.to(at), place=share.place.to(on))

        part = super()._place(part, touched_N)
        return replace(part, early=placed(part.early), late=placed(part.late))


def _true_in_parts(mask: Tensor, sizes: list[int]) -> list[int]:
    """How many are true in each part of the mask, all at once: there is a part for every rank."""
    before, ends = F.pad(mask.cumsum(0), (1, 0)), F.pad(torch.tensor(sizes).cumsum(0), (1, 0))
    counts: list[int] = before[ends].diff().tolist()
    return counts


class EarlyRowExchange(RowExchange):
    """A RowExchange that can also begin to send rows and go on. `ahead` is a copy of `mem` for what runs
    beside the step's exchanges.
    """

    def __init__(
        self,
        table: Tensor,
        groups: tuple[Group, Group],
        ahead: Group,
        device: torch.device | None = None,
        checksum: bool = False,
        wires: CommDtypes = AS_THEY_ARE,
    ) -> None:
        super().__init__(table, groups, device, checksum, wires)
        self.ahead = ahead

    def begin(self, route: AllToAllSplits, rows_QD: Tensor) -> RowsInFlight:
        """Send the rows that this owner is asked for, beside what follows."""
        return RowsInFlight(
            self.upload(pack(rows_QD, None, self.wires.rows, self.wires.backends)),
            route,
            self.ahead,
            self.checksum,
        )

    def complete(self, plan: RowPlan, arrival: RowsInFlight) -> Tensor:
        """The plan's unique rows `[U, D]`, of which the early ones, or all, were begun: the late ones are
        fetched now.
        """
        rows = self.unpack_rows(arrival.wait())
        if plan.early is None or plan.late is None:
            return rows
        rows_UD = rows.new_empty(plan.num_rows, rows.shape[1])
        rows_UD.index_copy_(0, plan.early.place, rows)
        return rows_UD.index_copy_(0, plan.late.place, self.fetch(plan.late))


class RowsInFlight:
    """Rows on their way beside the computation, as they travel."""

    def __init__(self, sent: Tensor, route: AllToAllSplits, group: Group, checksum: bool) -> None:
        self.route, self._group = route, group
        self._sums = checksums(sent, route.receive) if checksum else None
        self.pending = begin_all_to_all(sent, route.receive, route.send, group)

    def wait(self) -> Tensor:
        """The rows asked for, in the order of the request; with a checksum they are verified now."""
        rows = self.pending.wait()
        if self._sums is not None:
            verify(self._sums, rows, self.route.send, self._group, "rows")
        return rows
