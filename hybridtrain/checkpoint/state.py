"""What of a run goes into a checkpoint: parameters and optimizer state, and of the table all rows or those that changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from hybridtrain.assemble import Parts
from hybridtrain.checkpoint.blocks import Rows, own_part
from hybridtrain.checkpoint.stored import CHANGED, MEMORY
from hybridtrain.memory import TableMemory
from hybridtrain.pieces import piece_name
from hybridtrain.snapshot import Snapshot


@dataclass
class Content:
    """What this rank saves: `state` says where each tensor lies in the whole, `sources` has the values (blocks.py)."""

    state: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, Tensor | Rows] = field(default_factory=dict)

    def add(self, state: dict[str, Tensor]) -> None:
        self.state |= state
        self.sources |= {name: own_part(value) for name, value in state.items()}

    def hold(self) -> None:
        """Copy to the CPU what the coming step will change; rows of a snapshot need not be."""
        for name, source in self.sources.items():
            if isinstance(source, Tensor):
                self.sources[name] = source.to("cpu", copy=True)


def content(parts: Parts, since: int | None, later: bool) -> Content:
    """All that this rank saves. Of a parameter that two stages hold the first stage's is saved.

    With `since` of the table only the rows that were written to since it had so many updates. `later`: rows may be read while
    training goes on, until `release`; the rest after `hold`.
    """
    out = Content()
    for stage in range(len(parts.stages)):
        out.add(parts.engine.state(stage, with_copies=False))
    memory = parts.memory
    if memory is not None:
        out.add({f"{MEMORY}{name}": value for name, value in memory.stale_state().items()})
        rows = Snapshot(memory.row_tensors())
        kept = later and memory.optimizer.watch(rows.keep)
        if since is not None:
            _add_changed(out, memory, rows, since)
        else:
            out.add({f"{MEMORY}{name}": value for name, value in memory.logical_rows().items()})
            if kept:
                out.sources |= {f"{MEMORY}{name}": partial(rows.read, name) for name in memory.row_tensors()}
    return out


def release(parts: Parts) -> None:
    """The rows of `content` were read."""
    if parts.memory is not None:
        parts.memory.optimizer.watch(None)


def _add_changed(out: Content, memory: TableMemory, rows: Snapshot, since: int) -> None:
    changed_N = memory.optimizer.changed_since(since)
    piece = piece_name(CHANGED, memory.low, memory.high)
    out.add({f"{piece}.numbers": (changed_N + memory.low).cpu()})
    for name, value in memory.row_tensors().items():
        shape = (len(changed_N), *value.shape[1:])
        out.state[f"{piece}.{name}"] = torch.empty(shape, dtype=value.dtype, device="meta")
        out.sources[f"{piece}.{name}"] = partial(_gather, rows, name, changed_N)


def _gather(rows: Snapshot, name: str, numbers_N: Tensor, low: int, high: int) -> Tensor:
    return rows.gather(name, numbers_N[low:high])
