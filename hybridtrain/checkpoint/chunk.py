"""A stored chunk of a tensor, as `torch.save` writes it into a checkpoint's file: where its bytes lie, and
reading them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.utils import serialization

from hybridtrain.checkpoint.archive import DTYPES, PICKLE, STORAGES, Archive
from hybridtrain.files.pickles import Made, Named, unpickle
from hybridtrain.files.untrusted import UntrustedFileError, inside, open_regular


@dataclass(frozen=True)
class StoredChunk:
    """A stored chunk of a tensor: `length` bytes from `start` of a file, the storage of a tensor of that
    shape and stride.
    """

    file: Path
    start: int
    length: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def find(cls, folder: Path, entry: Any, shape: Sequence[int], dtype: torch.dtype) -> StoredChunk:
        """The chunk of an entry of the index: `relative_path`, `offset` and `length` of a file in `folder`.

        Its archive's header and directory are read, none of the data. Raises OSError, and UntrustedFileError
        where it is not of the shape and dtype that the index says, or its bytes are not all there.
        """
        file = inside(folder, entry.relative_path, "the index of tensors")
        with open_regular(file) as stream:
            archive = Archive(stream, entry.offset, entry.length, str(file))
            header = _read_header(archive.read(PICKLE, _MAX_HEADER), str(file))
            start, length = archive.record(f"data/{header.key}")
        before = header.offset * header.dtype.itemsize
        problem = header.misfit(tuple(shape), dtype, length)
        if problem:
            raise UntrustedFileError(f"{file}: {problem}")
        return cls(file, start + before, length - before, header.shape, header.stride, header.dtype)

    def read(self, low: int, high: int) -> Tensor:
        """Rows `low` to `high-1` (dim 0); all of a tensor without dims."""
        out = torch.empty((high - low, *self.shape[1:]) if self.shape else (), dtype=self.dtype)
        self.read_into(out, low, high)
        return out

    def read_into(self, out: Tensor, low: int, high: int) -> None:
        """The same into `out`, of their shape, any dtype and device."""
        if not out.numel():
            return
        if not self._in_rows():
            whole = torch.empty(_extent(self.shape, self.stride), dtype=self.dtype)
            self._read_bytes(whole, 0)
            out.copy_(whole.as_strided(self.shape, self.stride)[low:high])
            return
        straight = out.device.type == "cpu" and out.dtype == self.dtype and out.is_contiguous()
        target = out if straight else torch.empty(out.shape, dtype=self.dtype)
        self._read_bytes(target, low * math.prod(self.shape[1:]) * self.dtype.itemsize)
        if not straight:
            out.copy_(target)

    def _in_rows(self) -> bool:
        return torch.empty(self.shape, device="meta").stride() == self.stride

    def _read_bytes(self, target: Tensor, offset: int) -> None:
        rest = byte_view(target)
        with self.file.open("rb") as stream:
            stream.seek(self.start + offset)
            while rest.nbytes:
                count = cast(Any, stream).readinto(rest)
                if not count:
                    raise EOFError(f"{self.file} ends {rest.nbytes} bytes too early")
                rest = rest[count:]


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    return memoryview(cast(Any, tensor.view(-1).view(torch.uint8).numpy()))


@lru_cache(maxsize=1 << 10)
def frame(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What `torch.save` writes before and behind the bytes of a contiguous tensor, which may then come in
    parts; no CRC-32.
    """
    stream = _Frame()
    config = cast(Any, serialization.config)
    with (
        config.patch({"save.compute_crc32": False}),
        torch.serialization.skip_data(),
    ):  # it leaves room for data by moving on
        torch.save(torch.empty(shape, dtype=dtype), cast(IO[bytes], stream))
    return bytes(stream.head), bytes(stream.tail)


class _Frame(io.RawIOBase):
    """Takes what is written: `head` is what came before the stream was moved on."""

    def __init__(self) -> None:
        self.head, self.tail, self._moved = bytearray(), bytearray(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        part = self.tail if self._moved else self.head
        part += data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._moved += offset
        return self.tell()

    def tell(self) -> int:
        return len(self.head) + self._moved + len(self.tail)


@dataclass(frozen=True)
class _Header:
    """What `torch.save` says of a tensor."""

    key: str  # of its storage in the archive
    offset: int  # elements of the storage before the tensor's first
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def misfit(self, shape: tuple[int, ...], dtype: torch.dtype, length: int) -> str:
        """Why it is not a tensor of that shape and dtype in a storage of `length` bytes, or ""."""
        if (self.shape, self.dtype) != (shape, dtype):
            return f"holds {list(self.shape)} {self.dtype}, and the index says {list(shape)} {dtype}"
        extent = _extent(self.shape, self.stride)
        if extent < math.prod(shape):
            return f"holds a tensor of shape {list(shape)} in {extent} numbers"
        needed = (self.offset + extent) * dtype.itemsize
        return f"holds {length} bytes of a tensor's {needed}" if needed > length else ""


def _extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from a tensor's first to behind its last in memory."""
    return (
        1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if math.prod(shape)
        else 0
    )


_MAX_HEADER = 1 << 16
_TORCH_DIMS = 64  # of a tensor, at most
_REBUILD = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
_NAMES = frozenset(
    {
        "collections.OrderedDict",  # hooks, of which there are none
        *_REBUILD,
        *(f"torch.{name}" for name in DTYPES),
        *(f"{module}.{name}" for module in ("torch", "torch.storage") for name in STORAGES),
    }
)


def _read_header(content: bytes, source: str) -> _Header:
    """What the pickle of one tensor says. The newer form of it names the tensor's dtype, over a storage of
    bytes.
    """
    made = unpickle(content, source, _NAMES, persistent=True)
    try:
        if made.name not in _REBUILD:
            raise ValueError(f"it holds {made.name or 'something else'}")
        storage, offset, shape, stride, *rest = made.args
        _, kind, key, _, _ = storage.args
        named = [DTYPES[v.name] for v in rest if type(v) is Named and v.name in DTYPES]
        header = _Header(
            text(key),
            count(offset),
            counts(shape),
            counts(stride),
            named[0] if named else STORAGES[kind.name],
        )
        if type(storage) is not Made or storage.of != "" or len(header.shape) != len(header.stride):
            raise ValueError("its parts do not belong together")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UntrustedFileError(f"{source}: is not one stored tensor: {error}") from None
    return header


def text(value: Any) -> str:
    """The value, which must be a string; ValueError where not."""
    if type(value) is not str:
        raise ValueError(
            f"a {type(value).__name__} is not a string"
        )  # how it is written may take far more than it is long
    return value


def count(value: Any) -> int:
    """The value, which must be a size or offset; ValueError where not."""
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError("a size or offset is not a whole number from 0 on")
    return value


def counts(value: Any) -> tuple[int, ...]:
    """Sizes or offsets, one a dim, which a pickle has as a tuple or torch.Size; ValueError where it has
    something else.
    """
    sizes = (
        value.args[0]
        if type(value) is Made and value.name == "torch.Size" and len(value.args) == 1
        else value
    )
    if (
        type(sizes) not in (tuple, list) or len(sizes) > _TORCH_DIMS
    ):  # one long tuple may stand in many places
        raise ValueError("sizes or offsets are not numbers by dim")
    return tuple(map(count, sizes))
