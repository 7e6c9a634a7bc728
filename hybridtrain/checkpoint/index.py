"""torch's index of a checkpoint's tensors, `.metadata`: read as data (pickles.py), checked, and only then
turned into torch's objects.

It is a pickle of `Metadata`: for each tensor its dtype, shape and chunks, and for each chunk the file and the
bytes it lies in.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from hybridtrain.checkpoint.archive import DTYPES
from hybridtrain.checkpoint.chunk import count, counts, text
from hybridtrain.files.pickles import Made, Named, unpickle
from hybridtrain.files.untrusted import UntrustedFileError, first_of

MAX_INDEX = 1 << 28  # bytes: about two million chunks
MAX_DIMS = 8
_DCP = dcp.__name__
_NAMES = frozenset(
    {
        *(f"{_DCP}.{name}" for name in (*dcp.__all__, "_MEM_FORMAT_ENCODING")),
        *(f"{filesystem.__name__}.{name}" for name in ("_StorageInfo", "_StoragePrefix")),
        *(f"torch.{name}" for name in ("Size", "strided", *DTYPES)),
        "torch.serialization._get_layout",
        "builtins.getattr",  # how Python 3.11.0 to 3.11.3 pickled a member of an enum; nothing is called
    }
)


class Index(NamedTuple):
    """Tensors by name, and where each of their chunks lies."""

    tensors: dict[str, dcp.TensorStorageMetadata]
    places: dict[dcp.MetadataIndex, _StorageInfo]

    def problems(self, name: str) -> list[str]:
        """Why a tensor is not whole: its chunks lie outside of it, are missing, overlap, or have more bytes
        than are stored.
        """
        tensor = self.tensors[name]
        dims, itemsize = len(tensor.size), tensor.properties.dtype.itemsize
        if dims > MAX_DIMS:
            return [f"{name}: has {dims} dims; at most {MAX_DIMS} are read"]
        if math.prod(tensor.size) * itemsize >= 1 << 62:
            return [f"{name}: {list(tensor.size)} is more than any memory holds"]
        out = []
        for chunk in tensor.chunks:
            place = self.places.get(dcp.MetadataIndex(name, chunk.offsets))
            if len(chunk.offsets) != dims or len(chunk.sizes) != dims:
                out.append(f"{name}: a chunk of another number of dims than {dims}")
            elif any(
                o + s > most for o, s, most in zip(chunk.offsets, chunk.sizes, tensor.size, strict=True)
            ):
                out.append(
                    f"{name}: the chunk {list(chunk.sizes)} at {list(chunk.offsets)} leaves "
                    f"{list(tensor.size)}"
                )
            elif place is None:
                out.append(f"{name}: the chunk at {list(chunk.offsets)} lies in no file")
            elif math.prod(chunk.sizes) * itemsize > place.length:
                out.append(
                    f"{name}: the chunk {list(chunk.sizes)} at {list(chunk.offsets)} is said to lie in "
                    f"{place.length} bytes"
                )
        if not out and not _tiles(tensor.size, tensor.chunks):
            out.append(
                f"{name}: its chunks leave out a part of {list(tensor.size)}, or lie one over the other"
            )
        return out

    def misplaced(self, files: Mapping[str, int] | None) -> list[str]:
        """Chunks that lie in none of these files (sizes by name) or behind the end of one, and files with
        bytes that belong to two chunks.
        """
        by_file: dict[str, list[tuple[int, int]]] = {}
        for key, place in self.places.items():
            if key.fqn in self.tensors:
                by_file.setdefault(place.relative_path, []).append(
                    (place.offset, place.offset + place.length)
                )
        out = []
        for file, spans in by_file.items():
            spans.sort()
            if files is not None and file not in files:
                out.append(f"{file}: is not one of the checkpoint's files")
            elif files is not None and max(end for _, end in spans) > files[file]:
                out.append(f"{file}: a chunk ends at byte {max(end for _, end in spans)} of {files[file]}")
            if any(end > start for (_, end), (start, _) in pairwise(spans)):
                out.append(f"{file}: two chunks lie in the same bytes")
        return out

    def check(self, source: str, files: Mapping[str, int] | None) -> None:
        """Raise UntrustedFileError listing every problem of every tensor. `files`: sizes by name, where they
        are known.
        """
        problems = [p for name in self.tensors for p in self.problems(name)] + self.misplaced(files)
        if problems:
            raise UntrustedFileError(
                "\n  ".join([f"{source}: is not what it should be", *first_of(problems)])
            )


def read_index(content: bytes, source: str, foreign: bool = False) -> Index:
    """The index in a `.metadata`. `foreign`: another program wrote it, with names of its own, which are not
    looked up.

    Sizes, offsets and lengths are whole numbers from 0 on, dtypes torch's; what is not a tensor is left out.
    Raises UntrustedFileError naming `source` where it is not an index, is damaged or, unless `foreign`, has
    names that do not belong in one.
    """
    value = unpickle(content, source, None if foreign else _NAMES)
    try:
        fields = _fields(value, "Metadata")
        places = dict(_place(key, place) for key, place in _dict(fields["storage_data"] or {}))
        entries = {
            text(name): _entry(entry)
            for name, entry in _dict(fields["state_dict_metadata"])
            if _is_tensor(entry)
        }
        # each chunk has a place of its own, or `problems` names it; a list that stands in many places has far
        # more than its bytes
        if (chunks := sum(len(entry["chunks"]) for entry in entries.values())) > 2 * len(places):
            raise ValueError(f"it has {chunks:,} chunks of tensors in {len(places):,} places")
        tensors = {name: _tensor(entry) for name, entry in entries.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise UntrustedFileError(
            f"{source}: is not an index of tensors: {type(error).__name__}: {error}"[:500]
        ) from None
    return Index(tensors, places)


def _fields(value: Any, name: str, module: str = _DCP) -> dict[str, Any]:
    if type(value) is not Made or value.name != f"{module}.{name}":
        raise ValueError(f"{getattr(value, 'name', type(value).__name__)} in the place of {name}")
    if type(value.state) is not dict:
        raise ValueError(f"a {name} without fields")
    return value.state


def _dict(value: Any) -> Iterator[tuple[Any, Any]]:
    if type(value) is not dict:
        raise ValueError(f"{type(value).__name__} in the place of a dict")
    yield from value.items()


def _is_tensor(entry: Any) -> bool:
    return type(entry) is Made and entry.name == f"{_DCP}.TensorStorageMetadata"


def _entry(entry: Made) -> dict[str, Any]:
    fields = _fields(entry, "TensorStorageMetadata")
    if type(fields["chunks"]) is not list:
        raise ValueError("a tensor without a list of chunks")
    return fields


def _tensor(fields: dict[str, Any]) -> dcp.TensorStorageMetadata:
    properties = fields["properties"]
    if type(properties) is not Made or properties.name != f"{_DCP}.TensorProperties":
        raise ValueError("a tensor without properties")
    dtype = properties.state[0] if type(properties.state) is tuple and properties.state else None
    if type(dtype) is not Named or dtype.module != "torch" or dtype.name not in DTYPES:
        raise ValueError("a tensor without a dtype")
    return dcp.TensorStorageMetadata(
        dcp.TensorProperties(DTYPES[dtype.name]),
        torch.Size(counts(fields["size"])),
        [_chunk(c) for c in fields["chunks"]],
    )


def _chunk(value: Any) -> dcp.ChunkStorageMetadata:
    fields = _fields(value, "ChunkStorageMetadata")
    return dcp.ChunkStorageMetadata(
        torch.Size(counts(fields["offsets"])), torch.Size(counts(fields["sizes"]))
    )


def _place(key: Any, value: Any) -> tuple[dcp.MetadataIndex, _StorageInfo]:
    where = _fields(key, "MetadataIndex")
    offset = where.get("offset")
    place = _fields(value, "_StorageInfo", filesystem.__name__)
    if place.get("transform_descriptors"):
        raise ValueError("files that were transformed are not read")
    return (
        dcp.MetadataIndex(text(where["fqn"]), None if offset is None else counts(offset)),
        _StorageInfo(text(place["relative_path"]), count(place["offset"]), count(place["length"])),
    )


def _tiles(size: Sequence[int], chunks: Sequence[dcp.ChunkStorageMetadata]) -> bool:
    """Whether each element of a tensor is in one chunk.

    A box is known by its corners, each with a sign for how many of its bounds are upper ones. Boxes fill
    another without a gap or an overlap just where their corners sum up to that one's.
    """
    if len(chunks) == 1:
        return tuple(chunks[0].sizes) == tuple(size) or not math.prod(size)
    corners: Counter[tuple[int, ...]] = Counter()
    for offsets, sizes, weight in (
        (tuple(0 for _ in size), size, -1),
        *((c.offsets, c.sizes, 1) for c in chunks),
    ):
        bounds = [((o, 1), (o + s, -1)) for o, s in zip(offsets, sizes, strict=True)]
        for corner in product(*bounds):
            corners[tuple(at for at, _ in corner)] += weight * math.prod(sign for _, sign in corner)
    return not any(corners.values())
