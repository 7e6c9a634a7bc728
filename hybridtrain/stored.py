"""A checkpoint's tensors one by one, without a process group: read in slices, written as they are made.

Reading maps the files into memory, so a slice of a large table costs the slice; writing holds one tensor at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from hybridtrain.errors import CheckpointError


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
    """The tensors of the checkpoint folder `path` by their names ("model.…", "memory.…").

    Raises CheckpointError where the folder's index or one of its files cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            metadata = FileSystemReader(path).read_metadata()
        except Exception as error:  # whatever unpickling a damaged file raises
            raise CheckpointError(f"{path}: damaged: its index of tensors cannot be read: {error}") from None
        self._entries = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
        self._places: dict[MetadataIndex, Any] = dict(metadata.storage_data or {})
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(entry.size) for name, entry in self._entries.items()}

    def read(self, name: str, low: int = 0, high: int | None = None) -> Tensor:
        """Rows `low` to `high-1` (dim 0; all where None) of a tensor, on the CPU."""
        entry = self._entries[name]
        if not entry.size:
            return self._piece(name, entry.chunks[0].offsets).clone()
        high = entry.size[0] if high is None else high
        out = torch.empty(high - low, *entry.size[1:], dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            start, end = max(low, chunk.offsets[0]), min(high, chunk.offsets[0] + chunk.sizes[0])
            if start < end:
                rest = tuple(slice(o, o + s) for o, s in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True))
                piece = self._piece(name, chunk.offsets)
                out[(slice(start - low, end - low), *rest)] = piece[start - chunk.offsets[0] : end - chunk.offsets[0]]
        return out

    def _piece(self, name: str, offsets: torch.Size) -> Tensor:
        """One stored piece as a view of its file: torch says where its bytes lie when it loads without data."""
        place = self._places[MetadataIndex(name, offsets)]
        file = self.path / place.relative_path
        try:
            with file.open("rb") as stream, FakeTensorMode():
                view = cast(IO[bytes], _create_file_view(stream, place.offset, place.length))
                fake = torch.load(view, map_location="cpu", weights_only=True)
            storage = fake.untyped_storage()
            if not storage.nbytes():
                return torch.empty(fake.shape, dtype=fake.dtype)
            data = np.memmap(file, np.uint8, "c", place.offset + storage._checkpoint_offset, (storage.nbytes(),))
        except Exception as error:  # whatever a missing or damaged file makes torch or the disk raise
            raise CheckpointError(f"{file}: damaged: {name} cannot be read: {error}") from None
        return torch.from_numpy(data).view(fake.dtype).as_strided(fake.shape, fake.stride(), fake.storage_offset())


def write_tensors(folder: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write a checkpoint's tensors into `folder`, one in memory at a time. Raises CheckpointError where that fails."""
    state = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    writer = FileSystemWriter(folder, single_file_per_rank=False)  # it keeps what it wrote to a file until the file is done
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a world of one rank is meant to be one
        try:
            state_dict_saver.save(cast(dict[str, Any], state), storage_writer=writer, planner=_Maker(tensors), no_dist=True)
        except CheckpointException as error:
            ((cause, _),) = error.failures.values()
            raise CheckpointError(f"{folder}: cannot be written: {type(cause).__name__}: {cause}") from None


class _Maker(DefaultSavePlanner):
    """Plans from shapes alone, and makes each tensor when the writer asks for it."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        tensor = self.tensors[index.fqn]
        value = tensor.make()
        if tuple(value.shape) != tensor.shape or value.dtype != tensor.dtype:
            raise ValueError(f"{index.fqn}: made {list(value.shape)} {value.dtype}, planned {list(tensor.shape)} {tensor.dtype}")
        return value
