"""The digest of a logical tensor: the xxh3 (128 bits) of the xxh3s of its blocks of rows, whatever chunks it
lies in.

A block has as many rows of dim 0 as go into BLOCK bytes, one at least; a tensor without dims is one row. With
blocks, any reader can compute the digest in parts and continue after an interruption.
"""

from __future__ import annotations

import math

import torch
import xxhash
from torch import Tensor

from hybridtrain.checkpoint.chunk import byte_view
from hybridtrain.checkpoint.stored import StoredTensors

BLOCK = 1 << 22
SIZE = 16  # bytes of an xxh3


def rows_of(shape: tuple[int, ...]) -> int:
    """Rows of a tensor; one without dims is a row."""
    return shape[0] if shape else 1


def row_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape[1:]) * dtype.itemsize


def rows_per_block(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return max(1, BLOCK // max(1, row_bytes(shape, dtype)))


def digest_blocks(rows: Tensor, each: int) -> bytes:
    """The xxh3s of blocks of `each` rows, one after the other; `rows` is contiguous, on the CPU, and begins
    with a block.
    """
    if not rows.numel():
        return b""
    parts = rows.split(each) if rows.dim() else (rows,)
    return b"".join(xxhash.xxh3_128_digest(byte_view(part)) for part in parts)


def digest_of(blocks: bytes) -> str:
    """The tensor's digest, hex, from those of all its blocks in order."""
    return xxhash.xxh3_128_hexdigest(blocks)


def digest_stored(stored: StoredTensors, name: str) -> str:
    """The digest of a stored tensor, a block in memory at a time."""
    shape = stored.shapes[name]
    each = rows_per_block(shape, stored.dtype(name))
    blocks = bytearray()
    for low in range(0, rows_of(shape), each):
        blocks += digest_blocks(stored.read(name, low, min(low + each, rows_of(shape))), each)
    return digest_of(bytes(blocks))
