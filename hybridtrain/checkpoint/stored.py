"""A checkpoint's tensors one by one, without a process group: read in slices, written as they are made.

Reading takes the asked rows from their place in the files; writing holds one tensor at a time.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from hybridtrain.checkpoint.chunk import StoredChunk
from hybridtrain.checkpoint.files import Records, Writer, quiet
from hybridtrain.checkpoint.saved import Saved
from hybridtrain.errors import CheckpointError, DamagedCheckpoint, UserError
from hybridtrain.table.saved_rows import saved_rows_for

TABLE = "table."
CHANGED = f"{TABLE}changed"
"""Kind of the chunks (table/saved_rows.py) of an incremental checkpoint: its rows that changed since its base
was saved.
"""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class StoredTensors:
    """The tensors of the checkpoint `where` by their names ("model.…", "table.…"); an incremental one's
    with its base.

    Raises DamagedCheckpoint where the folder's index or one of its files cannot be read.
    """

    def __init__(self, where: Path | Saved) -> None:
        saved = Saved.of(where)
        self.path = saved.path
        self._entries, self._places = saved.index
        base = saved.base
        if base is not None and base.base is not None:
            raise DamagedCheckpoint(f"{self.path}: damaged: its base {base.path} is based on another one")
        self._base = StoredTensors(base) if base is not None else None
        here = {
            k.removeprefix(f"{CHANGED}.").partition(".")[2] for k in self._entries if k.startswith(CHANGED)
        } - {"numbers"}
        self._merged = {
            f"{TABLE}{k}" for k in here
        }  # tensors whose changed rows are here and whose others are in the base
        self._numbers: dict[str, Tensor] = {}  # of changed rows, by chunk
        self._chunks: dict[str, Chunks] = {}
        self._found: dict[MetadataIndex, StoredChunk] = {}
        self.shapes: dict[str, tuple[int, ...]] = {
            k: tuple(v.size) for k, v in self._entries.items() if not k.startswith(CHANGED)
        }
        if self._base is not None:
            self.shapes |= {k: self._base.shape(k) for k in sorted(self._merged)}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor. Raises DamagedCheckpoint where no tensor has that name."""
        if name not in self.shapes:
            raise DamagedCheckpoint(f"{self.path}: damaged or not of this model: it has no {name}")
        return self.shapes[name]

    def read(self, name: str, low: int = 0, high: int | None = None) -> Tensor:
        """Rows `low` to `high-1` (dim 0; all where None) of a tensor, on the CPU."""
        shape = self.shape(name)
        if shape:
            high = shape[0] if high is None else high
            shape = (high - low, *shape[1:])
        out = torch.empty(shape, dtype=self.dtype(name))
        self.read_into(out, name, low)
        return out

    def read_into(self, out: Tensor, name: str, low: int = 0) -> None:
        """Fill `out`, of any dtype and device, with as many rows of a tensor as it has, from row `low` on.

        Raises DamagedCheckpoint where the tensor has fewer, has another shape or is damaged.
        """
        shape = self.shape(name)
        if (
            tuple(out.shape[1:]) != shape[1:]
            or out.dim() != len(shape)
            or (shape and not 0 <= low <= low + len(out) <= shape[0])
        ):
            raise DamagedCheckpoint(
                f"{self.path}: {name} is {list(shape)}; {list(out.shape)} from row {low} on were asked for"
            )
        if self._base is not None and name in self._merged:
            self._base.read_into(out, name, low)
            self._write_changes_over(out, name, low)
        else:
            self._read_rows(out, name, low)

    def dtype(self, name: str) -> torch.dtype:
        if self._base is not None and name in self._merged:
            return self._base.dtype(name)
        return self._entries[name].properties.dtype

    def row_chunks(self, kind: str, low: int, high: int) -> list[str]:
        """The chunks of rows of a kind (table/saved_rows.py) that may have rows among `low` to `high-1`."""
        try:
            return saved_rows_for(self._entries, kind, low, high)
        except ValueError as error:
            raise DamagedCheckpoint(f"{self.path}: damaged: {error}") from None

    def _write_changes_over(self, out: Tensor, name: str, low: int) -> None:
        """Put the changed ones among the rows from `low` on in their places."""
        high = low + len(out)
        for chunk in self.row_chunks(CHANGED, low, high):
            numbers = self._numbers_of(chunk)
            start, end = torch.searchsorted(numbers, torch.tensor([low, high])).tolist()
            if start < end:
                theirs = f"{chunk}.{name.removeprefix(TABLE)}"
                if theirs not in self._entries or tuple(self._entries[theirs].size) != (
                    len(numbers),
                    *out.shape[1:],
                ):
                    raise DamagedCheckpoint(
                        f"{self.path}: damaged: {theirs} is missing or does not have {len(numbers)} such rows"
                    )
                values = torch.empty((end - start, *out.shape[1:]), dtype=self.dtype(name))
                self._read_rows(values, theirs, start)
                out.index_copy_(0, (numbers[start:end] - low).to(out.device), values.to(out))

    def _numbers_of(self, chunk: str) -> Tensor:
        if chunk not in self._numbers:
            numbers = torch.empty(tuple(self._entries[f"{chunk}.numbers"].size), dtype=torch.int64)
            self._read_rows(numbers, f"{chunk}.numbers", 0)
            if (
                numbers.dim() != 1
                or (len(numbers) and int(numbers[0]) < 0)
                or bool((numbers.diff() <= 0).any())
            ):
                raise DamagedCheckpoint(f"{self.path}: damaged: the numbers of {chunk} do not ascend")
            self._numbers[chunk] = numbers
        return self._numbers[chunk]

    def _read_rows(self, out: Tensor, name: str, low: int) -> None:
        if not out.shape:
            (chunk,) = self._entries[name].chunks
            self._read_chunk(out, name, chunk, 0, 1)
            return
        if name not in self._chunks:
            self._chunks[name] = Chunks(self._entries[name].chunks)
        high = low + len(out)
        for chunk in self._chunks[name].meeting(low, high):
            start, end = max(low, chunk.offsets[0]), min(high, chunk.offsets[0] + chunk.sizes[0])
            if start < end:
                rest = tuple(slice(o, o + s) for o, s in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True))
                target = out[(slice(start - low, end - low), *rest)]
                self._read_chunk(target, name, chunk, start - chunk.offsets[0], end - chunk.offsets[0])

    def _read_chunk(self, out: Tensor, name: str, chunk: ChunkStorageMetadata, low: int, high: int) -> None:
        index = MetadataIndex(name, chunk.offsets)
        place = self._places[index]
        try:
            if index not in self._found:
                self._found[index] = StoredChunk.find(
                    self.path, place, chunk.sizes, self._entries[name].properties.dtype
                )
            self._found[index].read_into(out, low, high)
        except Exception as error:  # whatever a missing or damaged file makes torch or the disk raise
            raise DamagedCheckpoint(
                f"{self.path / place.relative_path}: damaged: {name} cannot be read: {error}"
            ) from None


class Chunks:
    """The chunks of a tensor by their rows; a large tensor has many."""

    def __init__(self, chunks: Sequence[ChunkStorageMetadata]) -> None:
        self._sorted = sorted(chunks, key=lambda chunk: chunk.offsets[0])
        self._starts = [chunk.offsets[0] for chunk in self._sorted]
        self._longest = max((chunk.sizes[0] for chunk in chunks), default=0)

    def meeting(self, low: int, high: int) -> list[ChunkStorageMetadata]:
        """Those that may have any of the rows `low` to `high-1`."""
        return self._sorted[bisect_right(self._starts, low - self._longest) : bisect_left(self._starts, high)]


def write_tensors(folder: Path, tensors: Mapping[str, LazyTensor]) -> Records:
    """Write a checkpoint's tensors into `folder`, one in memory at a time; returns what `checkpoint.json`
    says of its files.

    Raises CheckpointError where that fails, and the UserError of a tensor that cannot be made.
    """
    state = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()
    }
    writer = Writer(
        folder, single_file_per_rank=False
    )  # it keeps what it wrote to a file until the file is done
    with quiet():
        try:
            state_dict_saver.save(
                cast(dict[str, Any], state), storage_writer=writer, planner=_Maker(tensors), no_dist=True
            )
        except CheckpointException as error:
            ((cause, _),) = error.failures.values()
            if isinstance(cause, UserError):
                raise cause from None
            raise CheckpointError(f"{folder}: cannot be written: {type(cause).__name__}: {cause}") from None
    return writer.records


class _Maker(DefaultSavePlanner):
    """Plans from shapes alone, and makes each tensor when the writer asks for it."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        tensor = self.tensors[index.fqn]
        value = tensor.make()
        if tuple(value.shape) != tensor.shape or value.dtype != tensor.dtype:
            raise ValueError(
                f"{index.fqn}: made {list(value.shape)} {value.dtype}, planned {list(tensor.shape)} "
                f"{tensor.dtype}"
            )
        return value
