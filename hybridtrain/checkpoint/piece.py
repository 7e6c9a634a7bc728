"""A stored piece of a tensor, as `torch.save` writes it into a checkpoint's file: where its bytes lie, and reading them."""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.utils import _create_file_view
from torch.storage import _storage_type_to_dtype_map
from torch.utils import serialization


@dataclass(frozen=True)
class Piece:
    """A stored piece of a tensor: `length` bytes from `start` of a file, the storage of a tensor of that shape and stride."""

    file: Path
    start: int
    length: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def find(cls, folder: Path, entry: Any) -> Piece:
        """The piece of an entry of the index: `relative_path`, `offset` and `length` of a file in `folder`.

        Its archive's header and directory are read, none of the data. Raises whatever a damaged one makes torch or pickle raise.
        """
        file = folder / entry.relative_path
        with file.open("rb") as stream:
            view = cast(IO[bytes], _create_file_view(stream, entry.offset, entry.length))
            archive = cast(Any, torch._C.PyTorchFileReader(view))
            header: _Header = _HeaderReader(io.BytesIO(archive.get_record("data.pkl"))).load()
            start = entry.offset + archive.get_record_offset(f"data/{header.storage.key}")
        before = header.offset * header.dtype.itemsize
        return cls(file, start + before, header.storage.num_bytes - before, header.shape, header.stride, header.dtype)

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
            whole = torch.empty(self.length // self.dtype.itemsize, dtype=self.dtype)
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
    """What `torch.save` writes before and behind the bytes of a contiguous tensor, which may then come in parts; no CRC-32."""
    stream = _Frame()
    config = cast(Any, serialization.config)
    with config.patch({"save.compute_crc32": False}), torch.serialization.skip_data():  # it leaves room for data by moving on
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
class _Storage:
    """The memory under a tensor, by its name in the archive."""

    dtype: torch.dtype
    key: str
    num_bytes: int


@dataclass(frozen=True)
class _Header:
    storage: _Storage
    offset: int  # elements of the storage before the tensor's first
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class _HeaderReader(pickle.Unpickler):
    """Reads what `torch.save` says of one tensor, of what this may consist, and makes no tensor of it."""

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _, elements = pid
        return _Storage(dtype, key, elements * dtype.itemsize)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):  # hooks, of which there are none
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return _header
        storages = {"UntypedStorage": torch.uint8, **_storage_type_to_dtype_map()}
        found = storages.get(name) or getattr(torch, name, None)
        if module not in ("torch", "torch.storage") or not isinstance(found, torch.dtype):
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a stored tensor")
        return found


def _header(storage: _Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> _Header:
    """What `torch._utils` would make a tensor of; the newer form names the tensor's dtype, over bytes."""
    dtype = next((value for value in rest if isinstance(value, torch.dtype)), storage.dtype)
    return _Header(storage, offset, tuple(shape), tuple(stride), dtype)
