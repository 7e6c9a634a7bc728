"""How FSDP adds up gradients on gloo: in rank order, so that ranks add up as micro-batches of one rank do, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter


class RankOrderSum(ReduceScatter):
    """In place of FSDP's reduce-scatter: one all-to-all, and each rank adds up its parts, rank 0's first.

    A ring adds each part up from another rank on. On gloo, whose reduce-scatter is an all-reduce of the whole, this sends half
    as much; it holds as many bytes again as the gradients of one layer.
    """

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        if op != dist.ReduceOp.SUM or async_op:
            raise ValueError(f"gradients are summed, at once; got {op}, async_op={async_op}")
        parts = torch.empty_like(input_tensor)
        dist.all_to_all_single(parts, input_tensor, group=group)
        first, *others = parts.chunk(group.size())
        output_tensor.copy_(first)
        for part in others:
            output_tensor += part
