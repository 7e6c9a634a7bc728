"""Files that survive a crash: written as a whole and flushed to the disk, and known again by their
checksums.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import xxhash

from hybridtrain.files.untrusted import open_regular

READ_BYTES = 1 << 20  # at once


@dataclass(frozen=True)
class FileRecord:
    """The size and xxh3 (128 bits, hex) of a finished file when it was written."""

    size: int
    xxh3: str


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves either the old or the new one, durably."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as stream:
        stream.write(content)
        sync_file(stream)
    part.replace(path)
    sync_folder(path.parent)


def sync_file(stream: IO[Any]) -> None:
    """Make what was written to an open file durable."""
    stream.flush()
    os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_record(path: Path, alive: Callable[[], None] = lambda: None) -> FileRecord:
    """The record of the file as it is now. `alive` is called for every part that was read.

    Raises OSError where the file cannot be read.
    """
    digest, size, buffer = xxhash.xxh3_128(), 0, memoryview(bytearray(READ_BYTES))
    with open_regular(path) as stream:
        while count := cast(Any, stream).readinto(buffer):
            digest.update(buffer[:count])
            size += count
            alive()
    return FileRecord(size, digest.hexdigest())


def file_digest(path: Path) -> str:
    """The xxh3 (128 bits, hex) of a file's bytes; OSError where it cannot be read."""
    return file_record(path).xxh3
