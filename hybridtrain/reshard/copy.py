"""Copies tensors into files laid out for the ranks of a placement, in bounded memory, and reads back what it
wrote.

The tensors, in order, are cut into spans of whole rows, each of which is a chunk of every rank that has a
part of it. A segment is as many spans as fill SEGMENT bytes, more for many ranks; each rank that has a part
of them gets one file of it. Threads copy a segment each: a span is read block by block, and a block written
while it is in the processor's cache; then the span is read back. When all files of a segment are on the disk,
and the source was found to be what it was, the segment is noted in the journal.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from hybridtrain.checkpoint.blocks import BLOCK_BYTES
from hybridtrain.checkpoint.chunk import StoredChunk, byte_view, frame
from hybridtrain.checkpoint.files import Writer
from hybridtrain.errors import DamagedCheckpoint, UserError
from hybridtrain.reshard import digest
from hybridtrain.reshard.journal import Journal, Segment, WrittenChunk
from hybridtrain.reshard.placement import Box
from hybridtrain.reshard.source import Source

SEGMENT = 1 << 27  # what a kill may cost, for each thread
PER_RANK = 1 << 24  # of a segment at least, so that files do not become small where ranks are many
THREADS = 8  # at most, and at least two: one of them may wait for the disk
MAX_MEMORY = 512 * 10**6
HELD = 4
"""Blocks that a thread holds at most: one that is read and what it is made of, or written and cut; one read
back and its parts.
"""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Span:
    """Rows `low` to `high-1` of a tensor."""

    name: str
    low: int
    high: int


@dataclass(frozen=True)
class CopyOptions:
    """At most `max_memory` bytes of the tensors are in memory at once; `show`: with a progress bar."""

    max_memory: int = MAX_MEMORY
    show: bool = False


def plan_threads(source: Source, max_memory: int) -> int:
    """How many threads copy. Raises UserError where `max_memory` bytes cannot hold the blocks, or largest
    rows, of two.
    """
    largest = max(source.shapes, key=lambda name: digest.row_bytes(source.shapes[name], source.dtype(name)))
    each = HELD * max(digest.BLOCK, digest.row_bytes(source.shapes[largest], source.dtype(largest)))
    if max_memory < 2 * each:
        raise UserError(
            f"--max-memory {max_memory} bytes: {2 * HELD} blocks of {digest.BLOCK} bytes, or rows of "
            f"{largest}, are held at once; it may be {2 * each} or more"
        )
    return min(THREADS, max(2, os.cpu_count() or 1), max_memory // each)


def plan_segments(source: Source, ranks: int) -> list[list[Span]]:
    """All rows of all tensors."""
    segments: list[list[Span]] = [[]]
    size = 0
    for name, shape in source.shapes.items():
        bytes_a_row = digest.row_bytes(shape, source.dtype(name))
        block = digest.rows_per_block(shape, source.dtype(name))
        step = block * max(1, BLOCK_BYTES // max(1, block * bytes_a_row))
        for low in range(0, digest.rows_of(shape) if bytes_a_row else 0, step):
            high = min(low + step, digest.rows_of(shape))
            if size >= max(SEGMENT, ranks * PER_RANK):
                segments.append([])
                size = 0
            segments[-1].append(Span(name, low, high))
            size += (high - low) * bytes_a_row
    return segments


class Copy:
    """Copies `segments` of `source` into `folder`, each tensor cut as `boxes` says; `wrote` is told the
    bytes, by any thread.
    """

    def __init__(
        self,
        source: Source,
        boxes: Mapping[str, Sequence[Box]],
        segments: Sequence[Sequence[Span]],
        folder: Path,
        wrote: Callable[[int], None],
    ) -> None:
        self.source, self.boxes, self.segments, self.folder, self.wrote = (
            source,
            boxes,
            segments,
            folder,
            wrote,
        )

    def run(self, journal: Journal, threads: int, verified: Future[None]) -> None:
        """Copy what the journal does not have yet; it is told nothing before the source is `verified`.

        Raises what `verified` raises, DamagedCheckpoint where the copy differs from the source when it is
        read back, and OSError.
        """
        with ThreadPoolExecutor(threads, "copy") as pool:
            upcoming = [
                pool.submit(self._copy, number) for number in range(len(journal.done), len(self.segments))
            ]
            try:
                finished: list[Segment] = []
                for future in upcoming:
                    finished.append(future.result())
                    if verified.done() or future is upcoming[-1]:
                        verified.result()
                        while finished:
                            journal.add(finished.pop(0))
            except BaseException as error:
                pool.shutdown(wait=False, cancel_futures=True)
                if isinstance(error, DamagedCheckpoint):
                    verified.result()  # knows better which file it is
                raise
        verified.result()  # where nothing was left to copy

    def _copy(self, number: int) -> Segment:
        """Write a segment's files, read them back, and flush them."""
        writer = Writer(self.folder)
        chunks: list[WrittenChunk] = []
        blocks: dict[str, bytes] = {}
        with ExitStack() as streams:
            opened: dict[str, Any] = {}
            for span in self.segments[number]:
                parts = []
                for box in (box for box in self.boxes[span.name] if box.meets(span.low, span.high)):
                    file = f"__{box.rank}_{number}.distcp"
                    if file not in opened:
                        opened[file] = streams.enter_context(
                            cast(Any, writer.fs).create_stream(self.folder / file, "wb")
                        )
                    parts.append(_Part(file, opened[file], span, box, self.source.dtype(span.name)))
                before = self._write(span, parts)
                written = [part.end() for part in parts]
                self._check(span, written, before)
                chunks += written
                blocks[span.name] = blocks.get(span.name, b"") + before
        return Segment(number, writer.records, chunks, blocks)

    def _write(self, span: Span, parts: Sequence[_Part]) -> bytes:
        """Write all parts of a span; returns the xxh3s of its blocks as they are in the source."""
        digests = bytearray()
        for low, high in self._blocks(span):
            rows = self.source.read(span.name, low, high)
            digests += digest.digest_blocks(rows, high - low)
            for part in parts:
                part.append(rows, low)
            self.wrote(rows.nbytes)
        return bytes(digests)

    def _check(self, span: Span, chunks: Sequence[WrittenChunk], before: bytes) -> None:
        """Read back what was written of a span: every logical block has the xxh3 that it had in the
        source.
        """
        dtype = self.source.dtype(span.name)
        found = [(chunk, StoredChunk.find(self.folder, chunk.place, chunk.sizes, dtype)) for chunk in chunks]
        after = bytearray()
        for low, high in self._blocks(span):
            after += digest.digest_blocks(self._read_back(span.name, found, low, high), high - low)
        if after != before:
            files = ", ".join(dict.fromkeys(chunk.file for chunk in chunks))
            raise DamagedCheckpoint(
                f"{self.folder}: {span.name}, rows {span.low} to {span.high - 1}, was read back from {files} "
                "with other values than were written; the disk or the memory of this machine is faulty"
            )

    def _read_back(
        self, name: str, chunks: Sequence[tuple[WrittenChunk, StoredChunk]], low: int, high: int
    ) -> Tensor:
        """Rows `low` to `high-1`, put together from the chunks that have a part of them."""
        shape = self.source.shapes[name]
        out = torch.empty((high - low, *shape[1:]) if shape else (), dtype=self.source.dtype(name))
        for place, chunk in chunks:
            if not shape:
                chunk.read_into(out, 0, 1)
                continue
            top, *inner = (slice(o, o + s) for o, s in zip(place.offsets, place.sizes, strict=True))
            start, end = max(low, top.start), min(high, top.stop)
            if start < end:
                chunk.read_into(
                    out[(slice(start - low, end - low), *inner)], start - top.start, end - top.start
                )
        return out

    def _blocks(self, span: Span) -> list[tuple[int, int]]:
        each = digest.rows_per_block(self.source.shapes[span.name], self.source.dtype(span.name))
        return [(low, min(low + each, span.high)) for low in range(span.low, span.high, each)]


class _Part:
    """The part of a span that lies in a box, as it is appended to the file of the box's rank."""

    def __init__(self, file: str, stream: Any, span: Span, box: Box, dtype: torch.dtype) -> None:
        self.name, self.file, self.stream, self.start = span.name, file, stream, stream.tell()
        self.offsets, self.sizes = box.rows(span.low, span.high)
        head, self.tail = frame(self.sizes, dtype)
        stream.write(head)

    def append(self, rows: Tensor, low: int) -> None:
        """Append the elements of this part that are in `rows`, those from `low` on; they come in order."""
        if self.sizes:
            top, *inner = (slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))
            rows = rows[(slice(max(top.start - low, 0), max(top.stop - low, 0)), *inner)]
        if rows.numel():
            self.stream.write(byte_view(rows.contiguous()))

    def end(self) -> WrittenChunk:
        """Note that the part is complete and can be read."""
        self.stream.write(self.tail)
        self.stream.flush()
        return WrittenChunk(
            self.name, self.offsets, self.sizes, self.file, self.start, self.stream.tell() - self.start
        )
