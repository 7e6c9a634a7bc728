"""Rows of the lookup table, fetched and given back once per step, outside the model.

Row ids depend on tokens alone, so a step's plan (which unique rows, from which owners) is made ahead in the
background. `fetch` is one all-to-all of rows, `push` one all-to-all of their gradients; owners sum duplicates
in a fixed order. No gradient or buffer here is ever as large as the table.

Shape legend: M micro-batches, B sequences, T tokens, L memory layers, S hash slots, U unique rows this rank
needs, Q rows other ranks (and this one) ask of this rank, N distinct local rows touched in the step, D row
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridtrain.kernels.choose import TORCH, Backends
from hybridtrain.kernels.rows.op import pack, segment_sum, unpack
from hybridtrain.parallel.async_all_to_all import begin_all_to_all
from hybridtrain.parallel.collectives import (
    Group,
    all_gather_uneven,
    all_reduce_,
    all_to_all,
    exchange_counts,
)


class ExchangeError(RuntimeError):
    """A row id or a payload arrived wrong: the message names group, ranks and numbers. Going on would corrupt
    the table.
    """


@dataclass(frozen=True)
class AllToAllSplits:
    """One all-to-all of rows from their owners to those who asked for them; gradients travel it backwards."""

    send: list[int]  # rows asked of each owner
    receive: list[int]  # rows each rank asks of this owner
    wanted_Q: (
        Tensor  # local row numbers asked of this owner, in the order of the asking ranks; where the table is
    )


@dataclass(frozen=True)
class PartialExchange(AllToAllSplits):
    """Some of an exchange's rows, which travel by themselves."""

    place: Tensor  # of those that this rank asks for, among the U rows of the exchange


@dataclass(frozen=True)
class RowPlan(AllToAllSplits):
    """One exchange: all rows that a group of micro-batches needs. Everything was computed from tokens alone."""

    index: list[Tensor]  # per micro-batch [B, T, L, S]: place of each lookup among that micro-batch's rows
    select: list[
        Tensor
    ]  # per micro-batch [U_m]: place of the micro-batch's rows among the U rows of the plan
    num_rows: int  # U
    slot_Q: Tensor  # place of each wanted row among the step's touched rows
    # with `ahead`, of a step's first exchange: the rows that the update before it leaves alone, and those
    # that it changes
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

    @property
    def late_rows(self) -> int | None:
        """How many of the first exchange's rows the update of the step before changes; None where that was
        not planned.
        """
        late = self.exchanges[0].late
        return sum(late.send) if late is not None else None


class RowPlanner:
    """Turns row ids into plans. Collective over `mem`: every rank calls `plan` for the same steps in the same
    order.

    With `ahead` each plan also says which of its rows the step of the plan before touches: owners know, and
    tell those who ask.
    """

    def __init__(
        self,
        bounds: Sequence[int],
        mem: Group,
        mem_replicate: Group,
        device: torch.device,
        *,
        exchange_groups: int = 1,
        checksum: bool = False,
        table_device: torch.device | None = None,
        ahead: bool = False,
    ) -> None:
        """What the model reads of a plan goes to `device`, what the owner of rows reads to `table_device`
        (None: the same).
        """
        self.bounds = torch.tensor(bounds)
        self.checksum = checksum
        self.mem, self.mem_replicate = mem, mem_replicate
        self.device, self.table_device, self.exchange_groups = device, table_device or device, exchange_groups
        self.ahead = ahead
        self._touched_before: Tensor | None = None
        self._plans = 0

    def plan(self, ids_MBTLS: Tensor) -> StepPlan:
        """The plan for row ids of the whole packed table, int64 on the CPU.

        Raises ExchangeError where an id lies outside the table, here or as received.
        """
        parts = [self._exchange(ids) for ids in ids_MBTLS.chunk(self.exchange_groups)]
        wanted = [part.wanted_Q for part in parts]
        touched = torch.unique(
            torch.cat(all_gather_uneven(torch.unique(torch.cat(wanted)), self.mem_replicate))
        )
        if self.ahead:
            if self._touched_before is not None:
                parts[0] = self._split(parts[0], self._touched_before)
            self._touched_before = touched
        self._plans += 1
        return StepPlan(
            [self._place(part, touched) for part in parts],
            touched.to(self.table_device),
            ids_MBTLS.numel(),
            sum(part.num_rows for part in parts),
            self._plans,
        )

    def _exchange(self, ids_MBTLS: Tensor) -> RowPlan:
        """All but the slots, on the CPU, where planning and its groups are."""
        self._check_range(ids_MBTLS, 0, int(self.bounds[-1]), "computed here")
        distinct, inverse = zip(*(torch.unique(ids, return_inverse=True) for ids in ids_MBTLS), strict=True)
        if len(distinct) == 1:
            rows_U, select = distinct[0], [torch.arange(len(distinct[0]))]
        else:
            rows_U, places = torch.unique(torch.cat(distinct), return_inverse=True)
            select = list(places.split([len(d) for d in distinct]))
        cuts = torch.searchsorted(rows_U, self.bounds)
        asked = cuts.diff()
        asking = exchange_counts(asked, self.mem)
        send, receive = asked.tolist(), asking.tolist()
        wanted = checked_all_to_all(rows_U, send, receive, self.mem, "row ids", self.checksum)
        low, high = int(self.bounds[self.mem.rank]), int(self.bounds[self.mem.rank + 1])
        self._check_range(wanted, low, high, f"received by owner {self.mem.rank}")
        return RowPlan(send, receive, wanted - low, list(inverse), select, len(rows_U), wanted.new_empty(0))

    def _split(self, part: RowPlan, touched_N: Tensor) -> RowPlan:
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
        """The plan with its slots, each part where it is read."""
        on, at = self.device, self.table_device

        def placed(share: PartialExchange | None) -> PartialExchange | None:
            return share and replace(share, wanted_Q=share.wanted_Q.to(at), place=share.place.to(on))

        return replace(
            part,
            index=[index.to(on) for index in part.index],
            select=[select.to(on) for select in part.select],
            wanted_Q=part.wanted_Q.to(at),
            slot_Q=torch.searchsorted(touched_N, part.wanted_Q).to(on),
            early=placed(part.early),
            late=placed(part.late),
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


def _true_in_parts(mask: Tensor, sizes: list[int]) -> list[int]:
    """How many are true in each part of the mask, all at once: there is a part for every rank."""
    before, ends = F.pad(mask.cumsum(0), (1, 0)), F.pad(torch.tensor(sizes).cumsum(0), (1, 0))
    counts: list[int] = before[ends].diff().tolist()
    return counts


class CommDtypes(NamedTuple):
    """What rows, and their gradients, are while they travel: as they are, or narrower (see kernels/rows); and
    what packs and sums them. The same on every rank.

    Also what stays on its rank is made narrower, so that a run does not depend on where its rows are.
    """

    rows: str = "exact"
    gradients: str = "exact"
    backends: Backends = TORCH


AS_THEY_ARE = CommDtypes()


class RowExchange:
    """Moves rows and their gradients between the ranks of `mem` according to a plan.

    Rows go to `device` before they travel, and their gradients stay there: the table may lie elsewhere.
    `ahead` is a copy of `mem` for the exchanges that run beside the step's.
    """

    def __init__(
        self,
        table: Tensor,
        mem: Group,
        mem_replicate: Group,
        checksum: bool = False,
        device: torch.device | None = None,
        ahead: Group | None = None,
        wires: CommDtypes = AS_THEY_ARE,
    ) -> None:
        self.table, self.mem, self.mem_replicate, self.checksum = table, mem, mem_replicate, checksum
        self.device, self.ahead, self.wires = device or table.device, ahead or mem, wires

    def fetch(self, route: AllToAllSplits) -> Tensor:
        """The route's rows as they are now, `[U, D]` where it is a whole plan, in ascending order of their
        ids: one all-to-all.
        """
        sent = self.upload(pack(self.table, route.wanted_Q, self.wires.rows, self.wires.backends))
        return self._unpack(
            checked_all_to_all(sent, route.receive, route.send, self.mem, "rows", self.checksum)
        )

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
        rows = self._unpack(arrival.wait())
        if plan.early is None or plan.late is None:
            return rows
        rows_UD = rows.new_empty(plan.num_rows, rows.shape[1])
        rows_UD.index_copy_(0, plan.early.place, rows)
        return rows_UD.index_copy_(0, plan.late.place, self.fetch(plan.late))

    def push(self, plan: RowPlan, grad_UD: Tensor, total_ND: Tensor) -> None:
        """Add the gradients of the plan's rows, from all ranks of `mem`, to the step's touched rows: one
        all-to-all.
        """
        wire, backends = self.wires.gradients, self.wires.backends
        sent = pack(grad_UD, None, wire, backends)
        received = checked_all_to_all(sent, plan.send, plan.receive, self.mem, "row gradients", self.checksum)
        rows_QD = unpack(received, grad_UD.shape[1], wire, backends)
        total_ND += segment_sum(rows_QD, plan.slot_Q, len(total_ND), backends)

    def _unpack(self, payload: Tensor) -> Tensor:
        return unpack(payload, self.table.shape[1], self.wires.rows, self.wires.backends)

    def reduce_replicas(self, total_ND: Tensor) -> None:
        """Sum the step's row gradients over the replicas of this shard, so that they stay bitwise equal."""
        all_reduce_(total_ND, self.mem_replicate)

    def upload(self, rows: Tensor) -> Tensor:
        """The rows on the model's device; out of host memory by way of a pinned buffer, so that the thread
        need not wait.
        """
        if rows.device == self.device:
            return rows
        return (rows.pin_memory() if self.device.type == "cuda" else rows).to(self.device, non_blocking=True)


class RowsInFlight:
    """Rows on their way beside the computation, as they travel."""

    def __init__(self, sent: Tensor, route: AllToAllSplits, group: Group, checksum: bool) -> None:
        self.route, self._group = route, group
        self._sums = _checksums(sent, route.receive) if checksum else None
        self.pending = begin_all_to_all(sent, route.receive, route.send, group)

    def wait(self) -> Tensor:
        """The rows asked for, in the order in which they were; with a checksum they are verified now."""
        rows = self.pending.wait()
        if self._sums is not None:
            _verify(self._sums, rows, self.route.send, self._group, "rows")
        return rows


def checked_all_to_all(
    x: Tensor, send: list[int], receive: list[int], group: Group, what: str, checksum: bool
) -> Tensor:
    """`all_to_all`, and with `checksum` a second small one that proves every part arrived as it was sent."""
    out = all_to_all(x, send, receive, group)
    if checksum:
        _verify(_checksums(x, send), out, receive, group, what)
    return out


def _verify(sums: Tensor, out: Tensor, receive: list[int], group: Group, what: str) -> None:
    """Raise ExchangeError where `out` has not the checksums that its senders tell; `sums` are those of what
    was sent here.
    """
    if group.size == 1:
        return
    wrong = (exchange_counts(sums, group) != _checksums(out, receive)).nonzero().flatten().tolist()
    if wrong:
        senders = ", ".join(str(group.ranks[i]) for i in wrong)
        raise ExchangeError(
            f"{what} from rank {senders} arrived damaged at rank {group.ranks[group.rank]} (group "
            f"{group.name})"
        )


def _checksums(x: Tensor, splits: list[int]) -> Tensor:
    """One int64 per split: its bytes, each times an odd number that depends on its place, summed modulo 2^64."""
    words = x.reshape(len(x), prod(x.shape[1:])).contiguous().view(torch.uint8).to(torch.int64) + 1
    per_row = (words * (torch.arange(words.shape[1], device=x.device) * 2 + 1)).sum(1)
    return torch.stack(
        [(part * (torch.arange(len(part), device=x.device) * 2 + 1)).sum() for part in per_row.split(splits)]
    )
