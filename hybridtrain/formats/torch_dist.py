"""Folders of Megatron-core's `torch_dist` format, which is torch's distributed checkpoint and two files more.

Read and written without Megatron.

.metadata        torch's index: the tensors, and where their pieces lie
__0_0.distcp …   pieces of tensors, each as `torch.save` writes it
common.pt        what is no tensor: the arguments of the run, its step
metadata.json    names the format; written last
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint import planner as dcp_planner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo, _StoragePrefix

from hybridtrain.checkpoint.files import METADATA
from hybridtrain.checkpoint.piece import Piece
from hybridtrain.checkpoint.stored import Chunks, LazyTensor
from hybridtrain.errors import DataError, FormatError
from hybridtrain.untrusted import inside, read_bytes, read_json

COMMON, FORMAT = "common.pt", "metadata.json"
TRACKER, RELEASE = "latest_checkpointed_iteration.txt", "release"  # "release": weights alone, nothing to resume
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}


@dataclass(frozen=True)
class Region:
    """A block of the stored tensor `key` of shape `whole`: `sizes` from `offsets` on, in every dim."""

    key: str
    whole: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class _Format(BaseModel):
    """What metadata.json says of a checkpoint's format."""

    sharded_backend: str


def is_torch_dist(folder: Path) -> bool:
    """Whether it is a folder of checkpoints as Megatron-LM writes them, or one checkpoint in it.

    A Hugging Face folder may have a metadata.json as well.
    """
    return (folder / TRACKER).is_file() or ((folder / FORMAT).is_file() and not (folder / "config.json").is_file())


def find_iteration(folder: Path) -> Path:
    """The checkpoint that such a folder names as its latest, or the folder where it is a checkpoint itself.

    Raises FormatError where it is of another of Megatron's formats, DataError where a file cannot be read.
    """
    try:
        if not (folder / FORMAT).is_file():
            latest = read_bytes(folder / TRACKER, 100).decode().strip()
            folder = folder / (f"iter_{int(latest):07d}" if latest != RELEASE else RELEASE)
        backend = read_json(folder / FORMAT, _Format).sharded_backend
    except FileNotFoundError as error:
        raise FormatError(
            str(folder), [f"{Path(error.filename).name} is missing: of Megatron's formats torch_dist is read"]
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: {TRACKER} or {FORMAT} is damaged: {error}") from None
    if backend != _FORMAT["sharded_backend"]:
        raise FormatError(str(folder), [f"sharded_backend={json.dumps(backend)}: of Megatron's formats torch_dist is read"])
    return folder


def read_common(folder: Path) -> dict[str, Any]:
    """What is no tensor. Nothing in the file is run: objects of foreign classes are stood in for."""
    path = folder / COMMON
    known: list[Any] = [(argparse.Namespace, "argparse.Namespace")]
    try:
        foreign = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - {name for _, name in known}
        with torch.serialization.safe_globals(known + [(_Foreign, name) for name in foreign]):
            common: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling a damaged file raises
        raise DataError(f"{path}: cannot be read: {error}") from None
    return common


class _Foreign:
    """In the place of an object of any class but the known ones: its values, and nothing that the class does."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _Index(pickle.Unpickler):
    """Reads `.metadata`: torch's records of tensors and places; all else is _Foreign."""

    def find_class(self, module: str, name: str) -> Any:
        if module == dcp.__name__ or module == dcp_planner.__name__:
            found = getattr(dcp if module == dcp.__name__ else dcp_planner, name, None)
            return found if isinstance(found, type) and found.__module__ == module else _Foreign
        value = getattr(torch, name, None) if module == "torch" else None
        if value is torch.Size or isinstance(value, torch.dtype):
            return value
        known = (_StorageInfo, _StoragePrefix, torch.serialization._get_layout)
        return next((k for k in known if (k.__module__, k.__name__) == (module, name)), _Foreign)


class TorchDist:
    """The tensors of a checkpoint folder, by regions. Raises DataError where its index cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            with (folder / METADATA).open("rb") as stream:
                metadata = _Index(stream).load()
            entries = metadata.state_dict_metadata
            self._places = metadata.storage_data
        except Exception as error:  # whatever unpickling a damaged file raises
            raise DataError(f"{folder / METADATA}: cannot be read: {error}") from None
        self._entries = {k: v for k, v in entries.items() if isinstance(v, dcp.TensorStorageMetadata)}
        self._chunks: dict[str, Chunks] = {}
        self.shapes: dict[str, tuple[int, ...]] = {k: tuple(v.size) for k, v in self._entries.items()}

    @property
    def objects(self) -> set[str]:
        """Keys of what is no tensor."""
        return {str(getattr(index, "fqn", index)) for index in self._places} - self._entries.keys()

    def dtype(self, key: str) -> torch.dtype:
        return self._entries[key].properties.dtype

    def read(self, region: Region) -> Tensor:
        """Its block, with all its dims. Raises DataError where a piece is missing, damaged, or overlaps another one."""
        out = torch.empty(region.sizes, dtype=self.dtype(region.key))
        filled = torch.zeros(region.sizes, dtype=torch.bool)
        if region.key not in self._chunks:
            chunks, dims = self._entries[region.key].chunks, len(region.sizes)
            if not all(len(chunk.offsets) == len(chunk.sizes) == dims for chunk in chunks):
                raise DataError(f"{self.folder / METADATA}: {region.key}: its pieces have not {dims} dims, as it has")
            self._chunks[region.key] = Chunks(chunks)
        for chunk in self._chunks[region.key].meeting(region.offsets[0], region.offsets[0] + region.sizes[0]):
            low = [max(o, c) for o, c in zip(region.offsets, chunk.offsets, strict=True)]
            ends = zip(region.offsets, region.sizes, chunk.offsets, chunk.sizes, strict=True)
            sizes = [min(o + s, c + n) - start for (o, s, c, n), start in zip(ends, low, strict=True)]
            if min(sizes, default=1) > 0:
                here = [a - o for a, o in zip(low, region.offsets, strict=True)]
                if bool(_narrow(filled, here, sizes).any()):
                    raise DataError(f"{self.folder}: {region.key}: two pieces hold the same values")
                within = [a - c for a, c in zip(low, chunk.offsets, strict=True)]
                _narrow(out, here, sizes).copy_(self._read_piece(region.key, chunk, within, sizes))
                _narrow(filled, here, sizes).fill_(True)
        if missing := int((~filled).sum()):
            raise DataError(f"{self.folder}: {region.key}: {missing} of {out.numel()} values asked for are in no piece")
        return out

    def _read_piece(self, key: str, chunk: dcp.ChunkStorageMetadata, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A block of a piece: rows of its first dim that is longer than one are read alone."""
        try:
            place = self._places[dcp.MetadataIndex(key, chunk.offsets)]
            inside(self.folder, place.relative_path, str(self.folder / METADATA))
            piece = Piece.find(self.folder, place)
            if piece.shape != tuple(chunk.sizes) or piece.dtype != self.dtype(key):
                raise ValueError(f"it is {piece.dtype} {list(piece.shape)}, the index says {self.dtype(key)} {list(chunk.sizes)}")
            first = next((dim for dim, size in enumerate(piece.shape[:-1]) if size > 1), len(piece.shape) - 1)
            piece = dataclasses.replace(piece, shape=piece.shape[first:], stride=piece.stride[first:])
            rows = piece.read(offsets[first], offsets[first] + sizes[first])
        except Exception as error:  # whatever a missing or damaged file makes torch or the disk raise
            raise DataError(f"{self.folder}: {key} cannot be read: {error}") from None
        return _narrow(rows, [0, *offsets[first + 1 :]], sizes[first:]).view(sizes)


def _narrow(value: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    return value[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]


def write_torch_dist(
    folder: Path, pieces: Sequence[tuple[Region, LazyTensor]], empty: Sequence[str], common: Mapping[str, Any], max_file_bytes: int
) -> None:
    """Write a checkpoint into the empty `folder`: the pieces, `empty` objects by their keys, and what is no tensor.

    A file has at most `max_file_bytes`, or one piece; one piece is in memory at a time. Raises OSError where the disk refuses.
    """
    entries: dict[str, Any] = {}
    places: dict[dcp.MetadataIndex, _StorageInfo] = {}
    files = _group([tensor.num_bytes for _, tensor in pieces], max_file_bytes)
    for number, members in enumerate(files):
        name = f"__0_{number}.distcp"
        with (folder / name).open("wb") as stream:
            for region, tensor in (pieces[i] for i in members):
                start, value = stream.tell(), tensor.make().contiguous().view(region.sizes)
                torch.save(value if value.untyped_storage().nbytes() == value.nbytes else value.clone(), stream)
                chunk = dcp.ChunkStorageMetadata(torch.Size(region.offsets), torch.Size(region.sizes))
                properties = dcp.TensorProperties(dtype=tensor.dtype)
                entry = entries.setdefault(region.key, dcp.TensorStorageMetadata(properties, torch.Size(region.whole), []))
                places[dcp.MetadataIndex(region.key, chunk.offsets)] = _StorageInfo(name, start, stream.tell() - start)
                entry.chunks.append(chunk)
            if number == len(files) - 1:  # one empty object stands for all
                start = stream.tell()
                torch.save([None], stream)
                there = _StorageInfo(name, start, stream.tell() - start)
                entries |= dict.fromkeys(empty, dcp.BytesStorageMetadata())
                places |= {dcp.MetadataIndex(key): there for key in empty}
    index = dcp.Metadata(entries, storage_data=places, storage_meta=dcp.StorageMeta(), version=CURRENT_DCP_VERSION)
    (folder / METADATA).write_bytes(pickle.dumps(index))
    torch.save(dict(common), folder / COMMON)
    (folder / FORMAT).write_text(json.dumps(_FORMAT), encoding="utf-8")


def _group(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Their numbers in runs of at most `most` in sum, or of one."""
    runs: list[list[int]] = [[]]
    total = 0
    for number, size in enumerate(sizes):
        if runs[-1] and total + size > most:
            runs.append([])
            total = 0
        runs[-1].append(number)
        total += size
    return runs
