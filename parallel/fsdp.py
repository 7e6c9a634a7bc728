"""FSDP's collectives: torch issues them, and they go through its own hooks, to be counted as ours are and, on
gloo, to add up gradients in rank order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from hybridtrain.parallel.collectives import Group, count_all_gather, count_all_reduce, count_reduce_scatter


def set_collectives(module: FSDPModule, shard: Group, replicate: Group, device: torch.device) -> None:
    """Enter the gathers and reductions of this module's own parameters under the names of the two groups."""
    module.set_custom_all_gather(_CountedAllGather(shard))
    module.set_custom_reduce_scatter(
        RankOrderSum(shard) if device.type == "cpu" else _CountedReduceScatter(shard)
    )
    if replicate.size > 1:
        module.set_all_reduce_hook(
            lambda reduced: count_all_reduce(reduced, replicate)
        )  # called behind torch's own all-reduce


class _CountedAllGather(DefaultAllGather):
    def __init__(self, counted: Group) -> None:
        self._counted = counted

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        count_all_gather(input_tensor, self._counted)
        work = super().__call__(output_tensor, input_tensor, group, True)
        if async_op or work is None:
            return work
        self._counted.traffic.wait(work)
        return None


class _CountedReduceScatter(DefaultReduceScatter):
    def __init__(self, counted: Group) -> None:
        self._counted = counted

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work:
        count_reduce_scatter(output_tensor, self._counted)
        return super().__call__(output_tensor, input_tensor, group, op, async_op)


class RankOrderSum(ReduceScatter):
    """The reduce-scatter on gloo: one all-to-all, and each rank adds up its parts, rank 0's first, so that
    ranks add up as micro-batches of one rank do, bit for bit.

    A ring adds each part up from another rank on. Gloo's own reduce-scatter is an all-reduce of the whole, so
    this sends half as much; it holds as many bytes again as the gradients of one layer.
    """

    def __init__(self, counted: Group) -> None:
        self._counted = counted

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        if op != dist.ReduceOp.SUM or async_op:
            raise ValueError(f"gradients are summed, at once; got {op}, async_op={async_op}")
        count_reduce_scatter(output_tensor, self._counted)
        parts = torch.empty_like(input_tensor)
        self._counted.traffic.wait(dist.all_to_all_single(parts, input_tensor, group=group, async_op=True))
        first, *others = parts.chunk(group.size())
        output_tensor.copy_(first)
        for part in others:
            output_tensor += part
