"""Large tensors are saved in blocks of rows, so that writing and reading hold at most a block in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from hybridtrain.checkpoint.chunk import byte_view

BLOCK_BYTES = 1 << 25

Rows = Callable[[int, int], Tensor]
"""Gives rows `low` to `high-1` of this rank's part of a tensor; its own storage is as large as they are."""


class BlockPlanner(DefaultSavePlanner):
    """Plans from the state dict, and takes the values from `sources`: by name, this rank's part or what gives
    its rows.
    """

    def __init__(self, sources: Mapping[str, Tensor | Rows]) -> None:
        super().__init__()
        self.sources = sources
        self._starts: dict[str, int] = {}  # the first row of this rank's part in the whole

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self._starts = {
            item.index.fqn: _chunk(item).offsets[0] for item in plan.items if _chunk(item).offsets
        }
        self.plan = replace(plan, items=[block for item in plan.items for block in _blocks(item)])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        name, chunk = write_item.index.fqn, _chunk(write_item)
        source = self.sources[name]
        if not chunk.sizes:
            return source if isinstance(source, Tensor) else source(0, 1)
        low = chunk.offsets[0] - self._starts[name]
        high = low + chunk.sizes[0]
        return _alone(source, low, high) if isinstance(source, Tensor) else source(low, high)


def own_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach()


def _chunk(item: WriteItem) -> ChunkStorageMetadata:
    if item.tensor_data is None:
        raise ValueError(f"{item.index.fqn} is not a tensor; checkpoints hold tensors alone")
    return item.tensor_data.chunk


def _blocks(item: WriteItem) -> list[WriteItem]:
    """The item as blocks of at most BLOCK_BYTES, or of one row; as it is where it is no larger."""
    data, chunk = item.tensor_data, _chunk(item)
    assert data is not None  # for the type checker: _chunk has looked
    size = data.properties.dtype.itemsize * chunk.sizes.numel()
    if size <= BLOCK_BYTES or chunk.sizes[0] == 1:
        return [item]
    rows = max(1, BLOCK_BYTES * chunk.sizes[0] // size)
    out = []
    for low in range(0, chunk.sizes[0], rows):
        offsets = torch.Size((chunk.offsets[0] + low, *chunk.offsets[1:]))
        sizes = torch.Size((min(rows, chunk.sizes[0] - low), *chunk.sizes[1:]))
        out.append(
            WriteItem(
                index=replace(item.index, offset=offsets),
                type=WriteItemType.SHARD,
                tensor_data=replace(data, chunk=ChunkStorageMetadata(offsets, sizes)),
            )
        )
    return out


def _alone(tensor: Tensor, low: int, high: int) -> Tensor:
    """Rows of a tensor under a storage of their own size, as the writer wants it; no copy of what lies on the
    CPU in order.
    """
    rows = tensor[low:high]
    if rows.device.type != "cpu" or not rows.is_contiguous() or not rows.numel():
        return rows  # the writer copies
    return torch.frombuffer(byte_view(rows), dtype=rows.dtype).view(rows.shape)
