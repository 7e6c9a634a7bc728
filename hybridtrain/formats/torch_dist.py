"""Folders of Megatron-core's `torch_dist` format, which is torch's distributed checkpoint and two files more.

Read and written without Megatron.

.metadata        torch's index: the tensors, and where their chunks lie
__0_0.distcp …   chunks of tensors, each as `torch.save` writes it
common.pt        what is not a tensor: the arguments of the run, its step
metadata.json    names the format; written last
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pickle  # to write
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo

from hybridtrain.checkpoint.archive import DTYPES, PICKLE, Archive
from hybridtrain.checkpoint.chunk import StoredChunk
from hybridtrain.checkpoint.files import METADATA
from hybridtrain.checkpoint.index import MAX_INDEX, read_index
from hybridtrain.checkpoint.stored import Chunks, LazyTensor
from hybridtrain.errors import DataError, FormatError
from hybridtrain.files.pickles import Made, Named, unpickle
from hybridtrain.files.untrusted import UntrustedFileError, inside, open_regular, read_bytes, read_json

COMMON, FORMAT = "common.pt", "metadata.json"
TRACKER, RELEASE = (
    "latest_checkpointed_iteration.txt",
    "release",
)  # "release": weights alone, nothing to resume
_MAX_COMMON, _MAX_PARTS, _MAX_DEPTH = 1 << 26, 1 << 18, 32
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Region:
    """A block of the stored tensor `key` of shape `whole`: `sizes` from `offsets` on, in every dim."""

    key: str
    whole: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class _Format(BaseModel):
    """The format of a checkpoint as metadata.json gives it."""

    sharded_backend: str


def is_torch_dist(folder: Path) -> bool:
    """Whether it is a folder of checkpoints as Megatron-LM writes them, or one checkpoint in it.

    A Hugging Face folder may have a metadata.json as well.
    """
    return (folder / TRACKER).is_file() or (
        (folder / FORMAT).is_file() and not (folder / "config.json").is_file()
    )


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
        raise FormatError(
            str(folder), [f"sharded_backend={json.dumps(backend)}: of Megatron's formats torch_dist is read"]
        )
    return folder


def read_common(folder: Path) -> dict[str, Any]:
    """The values that are not tensors, by name. Nothing in the file is run, and no object of its classes is
    made: a Foreign stands for every value that is not plain data.

    Raises DataError where the file cannot be read.
    """
    path = folder / COMMON
    try:
        with open_regular(path) as stream:
            archive = Archive(stream, 0, path.stat().st_size, str(path))
            value = unpickle(archive.read(PICKLE, _MAX_COMMON), str(path), None, persistent=True)
        if type(value) is not dict:
            raise UntrustedFileError(f"{path}: is not a dict but {_Plain()(value)!r:.100}")
        plain = _Plain()
        return {key: plain(entry) for key, entry in value.items() if type(key) is str}
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UntrustedFileError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


@dataclass(frozen=True)
class Foreign:
    """Stands for an object of any class but the known ones; `name` is that of the class."""

    name: str

    def __repr__(self) -> str:
        return f"an object of {self.name[:100]}"


class _Plain:
    """Makes plain data of what a pickle says: also argparse.Namespace and dtypes; at most so many parts, so
    many in each other.

    A long string, which may stand in many places as well, counts as one part for each 64 of its characters.
    """

    def __init__(self) -> None:
        self.left = _MAX_PARTS

    def __call__(self, value: Any, depth: int = 0) -> Any:
        self.left -= 1 + (len(value) // 64 if isinstance(value, str | bytes) else 0)
        if self.left < 0 or depth > _MAX_DEPTH:  # parts may stand in many places, each of which has them all
            raise UntrustedFileError(f"more than {_MAX_PARTS:,} parts, or {_MAX_DEPTH} in each other")
        if isinstance(value, list | tuple):
            return [self(part, depth + 1) for part in value]
        if type(value) is dict:
            return {key: self(part, depth + 1) for key, part in value.items() if type(key) is str}
        if type(value) is Named:
            return (
                DTYPES.get(value.name, Foreign(str(value)))
                if value.module == "torch"
                else Foreign(str(value))
            )
        if type(value) is Made:
            if value.name == "argparse.Namespace" and type(value.state) is dict:
                namespace = argparse.Namespace()
                vars(namespace).update(self(value.state, depth))
                return namespace
            return Foreign(value.name)
        return value


class TorchDist:
    """The tensors of a checkpoint folder, by regions. Raises DataError where its index cannot be read, or
    names other files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / METADATA
        try:
            self._index = read_index(read_bytes(path, MAX_INDEX), str(path), foreign=True)
            if misplaced := self._index.misplaced(self._sizes(str(path))):
                raise UntrustedFileError("; ".join(misplaced[:10]))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        except UntrustedFileError as error:
            raise DataError(f"{path}: cannot be read: {error}") from None
        self._entries, self._places = self._index
        self._chunks: dict[str, Chunks] = {}
        self.shapes: dict[str, tuple[int, ...]] = {k: tuple(v.size) for k, v in self._entries.items()}

    def _sizes(self, source: str) -> dict[str, int]:
        """Bytes of the files that are there."""
        names = {
            place.relative_path for key, place in self._index.places.items() if key.fqn in self._index.tensors
        }
        paths = {name: inside(self.folder, name, source) for name in names}
        return {name: path.stat().st_size for name, path in paths.items() if path.is_file()}

    @property
    def objects(self) -> set[str]:
        """Keys of what is not a tensor."""
        return {index.fqn for index in self._places} - self._entries.keys()

    def dtype(self, key: str) -> torch.dtype:
        return self._entries[key].properties.dtype

    def read(self, region: Region) -> Tensor:
        """Its block, with all its dims. Raises DataError where a chunk is missing or damaged, or the chunks
        are not the whole.
        """
        if region.key not in self._chunks:
            if problems := self._index.problems(region.key):
                raise DataError("\n  ".join([f"{self.folder / METADATA}: is damaged", *problems[:10]]))
            self._chunks[region.key] = Chunks(self._entries[region.key].chunks)
        out = torch.empty(region.sizes, dtype=self.dtype(region.key))
        for chunk in self._chunks[region.key].meeting(region.offsets[0], region.offsets[0] + region.sizes[0]):
            low = [max(o, c) for o, c in zip(region.offsets, chunk.offsets, strict=True)]
            ends = zip(region.offsets, region.sizes, chunk.offsets, chunk.sizes, strict=True)
            sizes = [min(o + s, c + n) - start for (o, s, c, n), start in zip(ends, low, strict=True)]
            if min(sizes, default=1) > 0:
                here = [a - o for a, o in zip(low, region.offsets, strict=True)]
                within = [a - c for a, c in zip(low, chunk.offsets, strict=True)]
                _narrow(out, here, sizes).copy_(self._read_chunk(region.key, chunk, within, sizes))
        return out

    def _read_chunk(
        self, key: str, chunk: dcp.ChunkStorageMetadata, offsets: Sequence[int], sizes: Sequence[int]
    ) -> Tensor:
        """A block of a chunk: rows of its first dim that is longer than one are read alone."""
        try:
            place = self._places[dcp.MetadataIndex(key, chunk.offsets)]
            stored = StoredChunk.find(self.folder, place, chunk.sizes, self.dtype(key))
            first = next(
                (dim for dim, size in enumerate(stored.shape[:-1]) if size > 1), len(stored.shape) - 1
            )
            stored = dataclasses.replace(stored, shape=stored.shape[first:], stride=stored.stride[first:])
            rows = stored.read(offsets[first], offsets[first] + sizes[first])
        except Exception as error:  # whatever a missing or damaged file makes torch or the disk raise
            raise DataError(f"{self.folder}: {key} cannot be read: {error}") from None
        return _narrow(rows, [0, *offsets[first + 1 :]], sizes[first:]).view(sizes)


def _narrow(value: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    return value[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]


def write_torch_dist(
    folder: Path,
    tensors: Sequence[tuple[Region, LazyTensor]],
    empty: Sequence[str],
    common: Mapping[str, Any],
    max_file_bytes: int,
) -> None:
    """Write a checkpoint into the empty `folder`: the chunks, `empty` objects by their keys, and what is
    not a tensor.

    A file has at most `max_file_bytes`, or one chunk; one chunk is in memory at a time. Raises OSError where
    the disk refuses.
    """
    entries: dict[str, Any] = {}
    places: dict[dcp.MetadataIndex, _StorageInfo] = {}
    files = _group([tensor.num_bytes for _, tensor in tensors], max_file_bytes)
    for number, members in enumerate(files):
        name = f"__0_{number}.distcp"
        with (folder / name).open("wb") as stream:
            for region, tensor in (tensors[i] for i in members):
                start, value = stream.tell(), tensor.make().contiguous().view(region.sizes)
                torch.save(
                    value if value.untyped_storage().nbytes() == value.nbytes else value.clone(), stream
                )
                chunk = dcp.ChunkStorageMetadata(torch.Size(region.offsets), torch.Size(region.sizes))
                properties = dcp.TensorProperties(dtype=tensor.dtype)
                entry = entries.setdefault(
                    region.key, dcp.TensorStorageMetadata(properties, torch.Size(region.whole), [])
                )
                places[dcp.MetadataIndex(region.key, chunk.offsets)] = _StorageInfo(
                    name, start, stream.tell() - start
                )
                entry.chunks.append(chunk)
            if number == len(files) - 1:  # one empty object stands for all
                start = stream.tell()
                torch.save([None], stream)
                there = _StorageInfo(name, start, stream.tell() - start)
                entries |= dict.fromkeys(empty, dcp.BytesStorageMetadata())
                places |= {dcp.MetadataIndex(key): there for key in empty}
    index = dcp.Metadata(
        entries, storage_data=places, storage_meta=dcp.StorageMeta(), version=CURRENT_DCP_VERSION
    )
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
