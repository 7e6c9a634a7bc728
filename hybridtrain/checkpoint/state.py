"""The parts of a run that a checkpoint has: parameters, optimizer state, and all rows of the table or those
that changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hybridtrain.checkpoint.blocks import Rows, own_part
from hybridtrain.checkpoint.stored import CHANGED, TABLE
from hybridtrain.table.copy_on_write import CopyOnWrite
from hybridtrain.table.lookup_table import LookupTable
from hybridtrain.table.saved_rows import saved_rows_name

if TYPE_CHECKING:
    from hybridtrain.run.assemble import Run


@dataclass
class Content:
    """What this rank saves: `state` says where each tensor lies in the whole, `sources` has the values
    (blocks.py).
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, Tensor | Rows] = field(default_factory=dict)

    def add(self, state: dict[str, Tensor]) -> None:
        self.state |= state
        self.sources |= {name: own_part(value) for name, value in state.items()}

    def hold(self) -> None:
        """Copy to the CPU what the coming step will change; rows of a CopyOnWrite need not be."""
        for name, source in self.sources.items():
            if isinstance(source, Tensor):
                self.sources[name] = source.to("cpu", copy=True)


def content(run: Run, since: int | None, later: bool) -> Content:
    """All that this rank saves. Where two stages hold a parameter, the first saves it.

    With `since`, only those rows of the table are saved that were written to after so many of its updates.
    `later`: rows may be read while training goes on, until `release`; the rest after `hold`.
    """
    out = Content()
    for stage in range(len(run.model_parts)):
        out.add(run.engine.state(stage, with_copies=False))
    table = run.table
    if table is not None:
        out.add({f"{TABLE}{name}": value for name, value in table.saved_rows().items()})
        rows = CopyOnWrite(table.row_tensors())
        kept = later and table.optimizer.watch(rows.keep)
        if since is not None:
            _add_changed(out, table, rows, since)
        else:
            out.add({f"{TABLE}{name}": value for name, value in table.logical_rows().items()})
            if kept:
                out.sources |= {f"{TABLE}{name}": partial(rows.read, name) for name in table.row_tensors()}
    return out


def release(run: Run) -> None:
    """The rows of `content` were read."""
    if run.table is not None:
        run.table.optimizer.watch(None)


def _add_changed(out: Content, table: LookupTable, rows: CopyOnWrite, since: int) -> None:
    changed_N = table.optimizer.changed_since(since)
    chunk = saved_rows_name(CHANGED, table.low, table.high)
    out.add({f"{chunk}.numbers": (changed_N + table.low).cpu()})
    for name, value in table.row_tensors().items():
        shape = (len(changed_N), *value.shape[1:])
        out.state[f"{chunk}.{name}"] = torch.empty(shape, dtype=value.dtype, device="meta")
        out.sources[f"{chunk}.{name}"] = partial(_gather, rows, name, changed_N)


def _gather(rows: CopyOnWrite, name: str, numbers_N: Tensor, low: int, high: int) -> Tensor:
    return rows.gather(name, numbers_N[low:high])
