"""Rows of the lookup table, fetched and given back once per step, outside the model.

Row ids depend on tokens alone, so a step's plan (which unique rows, from which owners) is made ahead in the
background. `fetch` is one all-to-all of rows, `push` one all-to-all of their gradients; owners sum duplicates in a
fixed order. No gradient or buffer here is ever as large as the table.

Shape legend: M micro-batches, B sequences, T tokens, L memory layers, S hash slots, U unique rows this rank needs,
Q rows other ranks (and this one) ask of this rank, N distinct local rows touched in the step, D row width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from hybridtrain.kernels.segment_sum import segment_sum
from hybridtrain.parallel.collectives import Group, all_gather_uneven, all_reduce_, all_to_all, exchange_counts


class ExchangeError(RuntimeError):
    """A row id or a payload arrived wrong: the message names group, ranks and numbers. Going on would corrupt the table."""


@dataclass(frozen=True)
class RowPlan:
    """One exchange: all rows that a group of micro-batches needs. Everything was computed from tokens alone."""

    index: list[Tensor]  # per micro-batch [B, T, L, S]: place of each lookup among that micro-batch's rows
    select: list[Tensor]  # per micro-batch [U_m]: place of the micro-batch's rows among the U rows of the plan
    num_rows: int  # U
    send: list[int]  # rows asked of each owner
    receive: list[int]  # rows each rank asks of this owner
    wanted_Q: Tensor  # local row numbers asked of this owner, in the order of the asking ranks
    slot_Q: Tensor  # place of each among the step's touched rows


@dataclass(frozen=True)
class StepPlan:
    """All exchanges of one step, and the local rows that they touch (over all replicas of this shard)."""

    exchanges: list[RowPlan]
    touched_N: Tensor  # sorted distinct local row numbers
    lookups: int
    unique: int


class RowPlanner:
    """Turns row ids into plans. Collective over `mem`: every rank calls `plan` for the same steps in the same order."""

    def __init__(
        self,
        bounds: Sequence[int],
        mem: Group,
        mem_replicate: Group,
        device: torch.device,
        *,
        exchange_groups: int = 1,
        checksum: bool = False,
    ) -> None:
        self.bounds = torch.tensor(bounds)
        self.checksum = checksum
        self.mem, self.mem_replicate = mem, mem_replicate
        self.device, self.exchange_groups = device, exchange_groups

    def plan(self, ids_MBTLS: Tensor) -> StepPlan:
        """The plan for row ids of the whole packed table, int64 on the CPU.

        Raises ExchangeError where an id lies outside the table, here or as received.
        """
        parts = [self._exchange(ids) for ids in ids_MBTLS.chunk(self.exchange_groups)]
        wanted = [part.wanted_Q for part in parts]
        touched = torch.unique(torch.cat(all_gather_uneven(torch.unique(torch.cat(wanted)), self.mem_replicate)))
        exchanges = [self._place(part, touched) for part in parts]
        return StepPlan(exchanges, touched.to(self.device), ids_MBTLS.numel(), sum(part.num_rows for part in parts))

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
        return RowPlan(list(inverse), select, len(rows_U), send, receive, wanted - low, wanted.new_empty(0))

    def _place(self, part: RowPlan, touched_N: Tensor) -> RowPlan:
        """The plan with its slots, on the device."""
        on = self.device
        return replace(
            part,
            index=[index.to(on) for index in part.index],
            select=[select.to(on) for select in part.select],
            wanted_Q=part.wanted_Q.to(on),
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


class RowExchange:
    """Moves rows and their gradients between the ranks of `mem` according to a plan."""

    def __init__(self, table: Tensor, mem: Group, mem_replicate: Group, checksum: bool = False) -> None:
        self.table, self.mem, self.mem_replicate, self.checksum = table, mem, mem_replicate, checksum

    def fetch(self, plan: RowPlan) -> Tensor:
        """The plan's unique rows `[U, D]`, in ascending order of their ids: one all-to-all."""
        rows_QD = self.table.index_select(0, plan.wanted_Q)
        return checked_all_to_all(rows_QD, plan.receive, plan.send, self.mem, "rows", self.checksum)

    def push(self, plan: RowPlan, grad_UD: Tensor, total_ND: Tensor) -> None:
        """Add the gradients of the plan's rows, from all ranks of `mem`, to the step's touched rows: one all-to-all."""
        grad_QD = checked_all_to_all(grad_UD, plan.send, plan.receive, self.mem, "row gradients", self.checksum)
        total_ND += segment_sum(grad_QD, plan.slot_Q, len(total_ND))

    def reduce_replicas(self, total_ND: Tensor) -> None:
        """Sum the step's row gradients over the replicas of this shard, so that they stay bitwise equal."""
        all_reduce_(total_ND, self.mem_replicate)


def checked_all_to_all(x: Tensor, send: list[int], receive: list[int], group: Group, what: str, checksum: bool) -> Tensor:
    """`all_to_all`, and with `checksum` a second small one that proves every part arrived as it was sent."""
    out = all_to_all(x, send, receive, group)
    if checksum and group.size > 1:
        told = exchange_counts(_checksums(x, send), group)
        wrong = (told != _checksums(out, receive)).nonzero().flatten().tolist()
        if wrong:
            senders = ", ".join(str(group.ranks[i]) for i in wrong)
            raise ExchangeError(
                f"{what} from rank {senders} arrived damaged at rank {group.ranks[group.rank]} (group {group.name})"
            )
    return out


def _checksums(x: Tensor, splits: list[int]) -> Tensor:
    """One int64 per split: its bytes, each times an odd number that depends on its place, summed modulo 2^64."""
    words = x.reshape(len(x), prod(x.shape[1:])).contiguous().view(torch.uint8).to(torch.int64) + 1
    per_row = (words * (torch.arange(words.shape[1], device=x.device) * 2 + 1)).sum(1)
    return torch.stack([(part * (torch.arange(len(part), device=x.device) * 2 + 1)).sum() for part in per_row.split(splits)])
