"""Rows of the lookup table, fetched and given back once per step, outside the model.

Row ids depend on tokens alone, so a step's plan (which unique rows, from which owners) is made ahead in the
background. `fetch` is one all-to-all of rows, `push` one all-to-all of their gradients; owners sum duplicates
in a fixed order. No gradient or buffer here is ever as large as the table.

Shape legend: M micro-batches, B sequences, T tokens, L Engram layers, S hash slots, U unique rows this rank
needs, Q rows other ranks (and this one) ask of this rank, N distinct local rows touched in the step, D row
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hybridtrain.kernels.choose import TORCH, Backends
from hybridtrain.kernels.rows.op import Wire, pack, segment_sum, unpack
from hybridtrain.parallel.checksums import ExchangeError, checksums, verify
from hybridtrain.parallel.collectives import (
    Group,
    all_gather_uneven,
    all_reduce_,
    all_to_all,
    exchange_counts,
)


@dataclass(frozen=True)
class AllToAllSplits:
    """One all-to-all of rows from their owners to those who asked for them; gradients travel it backwards."""

    send: list[int]  # rows asked of each owner
    receive: list[int]  # rows each rank asks of this owner
    # local row numbers asked of this owner, in the order of the asking ranks; where the table is
    wanted_Q: Tensor


@dataclass(frozen=True)
class PartialExchange(AllToAllSplits):
    """Some of an exchange's rows, which travel by themselves."""

    place: Tensor  # of the rows that this rank asks for, among the U rows of the exchange


@dataclass(frozen=True)
class RowPlan(AllToAllSplits):
    """One exchange: all rows that a group of micro-batches needs. It is computed from tokens alone."""

    index: list[Tensor]  # per micro-batch [B, T, L, S]: place of each lookup among that micro-batch's rows
    select: list[Tensor]  # per micro-batch [U_m]: place of its rows among the U rows of the plan
    num_rows: int  # U
    slot_Q: Tensor  # place of each wanted row among the step's touched rows
    # of a step's first exchange, where an OverlapPlanner made it: the rows that the update before leaves
    # alone, and those that it changes
    early: PartialExchange | None = None
    late: PartialExchange | None = None


@dataclass(frozen=True)
class StepPlan:
    """All exchanges of one step, and the local rows that they touch (over all replicas of this shard)."""

    exchanges: list[RowPlan]
    touched_N: Tensor  # sorted distinct local row numbers, where the table is
    lookups: int
    unique: int
    number: int  # of the plan among its planner's


class RowPlanner:
    """Turns row ids into plans. Collective over `mem`: every rank calls `plan` for the same steps in the same
    order.
    """

    def __init__(
        self,
        bounds: Sequence[int],
        groups: tuple[Group, Group],
        device: torch.device,
        exchange_groups: int = 1,
        checksum: bool = False,
        table_device: torch.device | None = None,
    ) -> None:
        """`bounds`: of the owners' rows, see `Layout.row_bounds`. `groups`: `mem` and `mem_replicate`.

        What the model reads of a plan goes to `device`, what the owner of rows reads to `table_device` (None:
        the same).
        """
        self.bounds = torch.tensor(bounds)
        self.checksum = checksum
        self.mem, self.mem_replicate = groups
        self.device, self.table_device, self.exchange_groups = device, table_device or device, exchange_groups
        self._plans = 0

    def plan(self, ids_MBTLS: Tensor) -> StepPlan:
        """The plan for row ids of the whole packed table, int64 on the CPU.

        Raises ExchangeError where an id lies outside the table, here or as received.
        """
        parts = [self._exchange(ids) for ids in ids_MBTLS.chunk(self.exchange_groups)]
        wanted = [part.wanted_Q for part in parts]
        touched = torch.unique(torch.cat(wanted))
        if self.mem_replicate.size > 1:
            touched = torch.unique(torch.cat(all_gather_uneven(touched, self.mem_replicate)))
        parts[0] = self._split(parts[0], touched)
        self._plans += 1
        return StepPlan(
            [self._place(part, touched) for part in parts],
            touched.to(self.table_device),
            ids_MBTLS.numel(),
            sum(part.num_rows for part in parts),
            self._plans,
        )

    def _exchange(self, ids_MBTLS: Tensor) -> RowPlan:
        """The plan without its slots, on the CPU, where planning and its groups are."""
        self._check_range(ids_MBTLS, 0, int(self.bounds[-1]), "computed here")
        distinct, inverse = zip(*(torch.unique(ids, return_inverse=True) for ids in ids_MBTLS), strict=True)
        if len(distinct) == 1:
            rows_U, select = distinct[0], [torch.arange(len(distinct[0]))]
        else:
            rows_U, places = torch.unique(torch.cat(distinct), return_inverse=True)
            select = list(places.split([len(d) for d in distinct]))
        cuts = torch.searchsorted(rows_U, self.bounds)
        asked = cuts.diff()
        asking = exchange_counts(asked, self.mem) if self.mem.size > 1 else asked
        send, receive = asked.tolist(), asking.tolist()
        wanted = exchange_rows(rows_U, send, receive, self.mem, "row ids", self.checksum)
        low, high = int(self.bounds[self.mem.rank]), int(self.bounds[self.mem.rank + 1])
        self._check_range(wanted, low, high, f"received by owner {self.mem.rank}")
        return RowPlan(send, receive, wanted - low, list(inverse), select, len(rows_U), wanted.new_empty(0))

    def _split(self, first: RowPlan, touched_N: Tensor) -> RowPlan:
        """The step's first exchange, before it is placed; OverlapPlanner says when its rows may travel."""
        return first

    def _place(self, part: RowPlan, touched_N: Tensor) -> RowPlan:
        """The plan with its slots, each part on the device that reads it."""
        on = self.device
        return replace(
            part,
            index=[index.to(on) for index in part.index],
            select=[select.to(on) for select in part.select],
            wanted_Q=part.wanted_Q.to(self.table_device),
            slot_Q=torch.searchsorted(touched_N, part.wanted_Q).to(on),
        )

    def _check_range(self, ids: Tensor, low: int, high: int, where: str) -> None:
        if ids.numel() == 0:
            return
        least, most = (int(v) for v in ids.aminmax())
        if least < low or most >= high:
            raise ExchangeError(
                f"row ids {where} reach from {least} to {most}, outside {low} to {high - 1} "
                f"(group {self.mem.name}, rank {self.mem.ranks[self.mem.rank]})"
            )


class CommDtypes(NamedTuple):
    """The formats in which rows and their gradients travel: as they are, or narrower (see kernels/rows); and
    the backends that pack and sum them. The same on every rank.

    Also what stays on its rank is made narrower, so that a run does not depend on where its rows are.
    """

    rows: Wire = "exact"
    gradients: Wire = "exact"
    backends: Backends = TORCH


AS_THEY_ARE = CommDtypes()


class RowExchange:
    """Moves rows and their gradients between the ranks of `mem` according to a plan.

    Rows go to `device` before they travel, and their gradients stay there: the table may lie elsewhere.
    """

    def __init__(
        self,
        table: Tensor,
        groups: tuple[Group, Group],
        device: torch.device | None = None,
        checksum: bool = False,
        wires: CommDtypes = AS_THEY_ARE,
    ) -> None:
        """`groups`: `mem` and `mem_replicate`."""
        self.table, self.checksum, self.wires = table, checksum, wires
        self.mem, self.mem_replicate = groups
        self.device = device or table.device

    def fetch(self, route: AllToAllSplits) -> Tensor:
        """The route's rows as they are now, `[U, D]` where it is a whole plan, in ascending order of their
        ids: one all-to-all.
        """
        sent = self.upload(pack(self.table, route.wanted_Q, self.wires.rows, self.wires.backends))
        return self.unpack_rows(
            exchange_rows(sent, route.receive, route.send, self.mem, "rows", self.checksum)
        )

    def push(self, plan: RowPlan, grad_UD: Tensor, total_ND: Tensor) -> None:
        """Add the gradients of the plan's rows, from all ranks of `mem`, to the step's touched rows: one
        all-to-all.
        """
        wire, backends = self.wires.gradients, self.wires.backends
        sent = pack(grad_UD, None, wire, backends)
        received = exchange_rows(sent, plan.send, plan.receive, self.mem, "row gradients", self.checksum)
        rows_QD = unpack(received, grad_UD.shape[1], wire, backends)
        total_ND += segment_sum(rows_QD, plan.slot_Q, len(total_ND), backends)

    def unpack_rows(self, payload: Tensor) -> Tensor:
        return unpack(payload, self.table.shape[1], self.wires.rows, self.wires.backends)

    def reduce_replicas(self, total_ND: Tensor) -> None:
        """Sum the step's row gradients over the replicas of this shard, so that they stay bitwise equal."""
        if self.mem_replicate.size > 1:
            all_reduce_(total_ND, self.mem_replicate)

    def upload(self, rows: Tensor) -> Tensor:
        """The rows on the model's device; out of host memory by way of a pinned buffer, so that the thread
        need not wait.
        """
        if rows.device == self.device:
            return rows
        return (rows.pin_memory() if self.device.type == "cuda" else rows).to(self.device, non_blocking=True)


def exchange_rows(
    x: Tensor, send: list[int], receive: list[int], group: Group, what: str, checksum: bool
) -> Tensor:
    """`all_to_all`, and with `checksum` a second small one that proves every part arrived as it was sent."""
    out = all_to_all(x, send, receive, group) if group.size > 1 else x
    if checksum:
        verify(checksums(x, send), out, receive, group, what)
    return out
