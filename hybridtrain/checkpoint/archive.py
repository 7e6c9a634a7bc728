"""The archives that `torch.save` writes: a zip file of a pickle and of the bytes of tensors, none of them
compressed.

They are read by Python's zipfile and by position; what a damaged or foreign one claims is looked at before
memory is taken for it.
"""

from __future__ import annotations

import io
import struct
import zipfile
from typing import IO, Any, cast

import torch
from torch.storage import _storage_type_to_dtype_map

from hybridtrain.files.untrusted import UntrustedFileError

PICKLE = "data.pkl"
DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
"""What torch calls its types of numbers, and nothing else of torch."""
STORAGES = {"UntypedStorage": torch.uint8, **_storage_type_to_dtype_map()}
_MAX_READ = 1 << 20  # at once, of a directory
_LOCAL = struct.Struct(
    "<4s22xHH"
)  # a record's own header: signature, lengths of its name and of what is added


class Archive:
    """The archive in `length` bytes of `stream` from `start` on. Raises UntrustedFileError naming `source`
    where it is not an archive.
    """

    def __init__(self, stream: IO[bytes], start: int, length: int, source: str) -> None:
        self.source, self._view = source, _View(stream, start, length)
        try:
            with zipfile.ZipFile(cast(IO[bytes], self._view)) as archive:
                self._records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        except (zipfile.BadZipFile, ValueError, OverflowError, NotImplementedError, struct.error) as error:
            raise UntrustedFileError(f"{source}: is not an archive of torch: {error}") from None

    def record(self, name: str) -> tuple[int, int]:
        """(where in the stream the bytes of a record begin, how many they are)."""
        info = self._records.get(name)
        if info is None:
            raise UntrustedFileError(f"{self.source}: is not an archive of torch: it lacks {name}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise UntrustedFileError(
                f"{self.source}: {name} is compressed or encrypted, which torch.save does not do"
            )
        self._view.seek(max(0, info.header_offset))
        head = self._view.read(_LOCAL.size)
        signature, name_length, added = _LOCAL.unpack(head) if len(head) == _LOCAL.size else (b"", 0, 0)
        low = info.header_offset + _LOCAL.size + name_length + added
        if signature != b"PK\3\4" or info.header_offset < 0 or low + info.file_size > self._view.length:
            raise UntrustedFileError(
                f"{self.source}: {name} would lie outside of its {self._view.length} bytes"
            )
        return self._view.start + low, info.file_size

    def read(self, name: str, most: int) -> bytes:
        """A record's bytes. Raises UntrustedFileError where it has more than `most`."""
        start, length = self.record(name)
        if length > most:
            raise UntrustedFileError(f"{self.source}: {name} has {length:,} bytes; at most {most:,} are read")
        self._view.stream.seek(start)
        return self._view.stream.read(length)


class _View(io.RawIOBase):
    """A part of a file as a file of its own, which is read in small parts only."""

    def __init__(self, stream: IO[bytes], start: int, length: int) -> None:
        size = stream.seek(0, io.SEEK_END)
        self.stream, self.start, self.length, self._at = stream, start, max(0, min(length, size - start)), 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.length}[whence]
        if self._at < 0:
            raise ValueError("it says that a part of it lies before it")
        return self._at

    def read(self, size: int | None = -1) -> Any:
        count = max(0, self.length - self._at)
        count = count if size is None or size < 0 else min(size, count)
        if count > _MAX_READ:
            raise ValueError(f"its directory has more than {_MAX_READ:,} bytes")
        self.stream.seek(self.start + self._at)
        found = self.stream.read(count)
        self._at += len(found)
        return found
