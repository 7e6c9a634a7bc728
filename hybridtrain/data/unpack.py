"""Compressed files, unpacked in bounded memory: a stream at a time, to its end or with a message."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import xxhash

from hybridtrain.errors import DataError

READ_BYTES = 1 << 20
_XZ_MEMORY = 256 << 20  # xz -9 needs 65 MiB to unpack


def unpack(raw: IO[bytes], compression: str, name: str) -> Iterator[bytes]:
    """The bytes of a file in blocks of at most about READ_BYTES; `compression` is one of COMPRESSIONS or "".

    Raises DataError, naming the file and the offset in the unpacked bytes, where a stream is damaged or cut,
    and where there are no bytes.
    """
    offset = 0
    try:
        for block in _DECOMPRESSORS[compression](raw):
            yield block
            offset += len(block)
    except EOFError:
        raise DataError(
            f"{name}: the {compression} stream is truncated; its text ends at byte {offset}"
        ) from None
    except (OSError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{name}: cannot be read beyond byte {offset} of its text: {error}") from None
    if offset == 0:
        raise DataError(f"{name}: is empty (0 bytes of text)")


def unpacked_digest(path: Path, compression: str, name: str) -> str:
    """The xxh3 (128 bits, hex) of a file's bytes as they are unpacked. Raises DataError as `unpack` does."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as raw:
        for block in unpack(raw, compression, name):
            digest.update(block)
    return digest.hexdigest()


def _gunzipped(raw: IO[bytes]) -> Iterator[bytes]:
    stream = gzip.GzipFile(fileobj=raw)
    return iter(lambda: stream.read1(READ_BYTES), b"")


def _decompressed(raw: IO[bytes], make: Callable[[], Any]) -> Iterator[bytes]:
    """Every stream of the file; the classes for files of the standard library leave out what follows a
    damaged one.
    """
    decoder = None
    while data := raw.read(READ_BYTES):
        while data:
            if decoder is None or decoder.eof:
                decoder = make()
            yield decoder.decompress(data, READ_BYTES)
            while not (decoder.eof or decoder.needs_input):
                yield decoder.decompress(b"", READ_BYTES)
            data = decoder.unused_data if decoder.eof else b""
    if decoder is not None and not decoder.eof:
        raise EOFError


_DECOMPRESSORS: dict[str, Callable[[IO[bytes]], Iterator[bytes]]] = {
    "": lambda raw: iter(lambda: raw.read(READ_BYTES), b""),
    ".gz": _gunzipped,
    ".xz": lambda raw: _decompressed(raw, lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY)),
    ".bz2": lambda raw: _decompressed(raw, bz2.BZ2Decompressor),
}
COMPRESSIONS = tuple(_DECOMPRESSORS)[1:]
