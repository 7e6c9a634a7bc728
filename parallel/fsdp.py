"""FSDP's collectives, counted as ours are: torch issues them, so they are counted on their way through its own hooks."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from hybridtrain.parallel.collectives import Group, count_all_gather, count_all_reduce, count_reduce_scatter


def count_collectives(module: FSDPModule, shard: Group, replicate: Group) -> None:
    """Enter the gathers and reductions of this module's own parameters under the names of the two groups."""
    module.set_custom_all_gather(_CountedAllGather(shard))
    module.set_custom_reduce_scatter(_CountedReduceScatter(shard))
    if replicate.size > 1:
        module.set_all_reduce_hook(lambda reduced: count_all_reduce(reduced, replicate))  # called behind torch's own all-reduce


class _CountedAllGather(DefaultAllGather):
    def __init__(self, counted: Group) -> None:
        self._counted = counted

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        count_all_gather(input_tensor, self._counted)
        return super().__call__(output_tensor, input_tensor, group, async_op)


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
