"""Copies tensors into files laid out for the ranks of a placement, in bounded memory, and reads back what it wrote.

Work goes through the tensors in order, by spans of whole rows that are in memory at once. A segment is as many spans as fill
SEGMENT bytes, more for many ranks; each rank that has a part of them gets one file of it. When all its files are on the disk and
were read back, the segment is noted in the journal. While a span is written the next one is read, and while a segment is
written the one before it is flushed and read back.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.utils import _create_file_view
from torch.utils import serialization

from hybridtrain.checkpoint.blocks import BLOCK_BYTES
from hybridtrain.checkpoint.files import Records, Writer, byte_view
from hybridtrain.errors import DamagedCheckpoint, UserError
from hybridtrain.reshard import digest
from hybridtrain.reshard.journal import Journal, Segment, StoredPiece
from hybridtrain.reshard.placement import Box
from hybridtrain.reshard.source import Source

SEGMENT = 1 << 28  # what a kill may cost; the disk is busy with one while the next is made
PER_RANK = 1 << 24  # of a segment at least, so that files do not become small where ranks are many
HELD = 8
"""Spans that are in memory at once at most: one being read, one being written and its parts, one being read back, and copies."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Span:
    """Rows `low` to `high-1` of a tensor."""

    name: str
    low: int
    high: int


def plan_segments(source: Source, max_memory: int, ranks: int) -> list[list[Span]]:
    """All rows of all tensors. Raises UserError where `max_memory` bytes cannot hold HELD times the largest row."""
    largest = max(source.shapes, key=lambda name: digest.row_bytes(source.shapes[name], source.dtype(name)))
    least = HELD * max(digest.BLOCK, digest.row_bytes(source.shapes[largest], source.dtype(largest)))
    if max_memory < least:
        raise UserError(
            f"--max-memory {max_memory} bytes: {HELD} blocks of {digest.BLOCK} bytes, or rows of {largest}, are held at once; "
            f"it may be {least} or more"
        )
    segments: list[list[Span]] = [[]]
    size = 0
    for name, shape in source.shapes.items():
        bytes_a_row = digest.row_bytes(shape, source.dtype(name))
        block = digest.rows_per_block(shape, source.dtype(name))
        step = block * max(1, min(max_memory // HELD, BLOCK_BYTES) // max(1, block * bytes_a_row))
        for low in range(0, digest.rows_of(shape) if bytes_a_row else 0, step):
            high = min(low + step, digest.rows_of(shape))
            if size >= max(SEGMENT, ranks * PER_RANK):
                segments.append([])
                size = 0
            segments[-1].append(Span(name, low, high))
            size += (high - low) * bytes_a_row
    return segments


class Copy:
    """Copies `segments` of `source` into `folder`, each tensor cut as `boxes` says; `wrote` is told the bytes."""

    def __init__(
        self,
        source: Source,
        boxes: Mapping[str, Sequence[Box]],
        segments: Sequence[Sequence[Span]],
        folder: Path,
        wrote: Callable[[int], None],
    ) -> None:
        self.source, self.boxes, self.segments, self.folder, self.wrote = source, boxes, segments, folder, wrote

    def run(self, journal: Journal) -> None:
        """Copy what the journal does not have yet. Raises DamagedCheckpoint where it reads back otherwise, and OSError."""
        todo = range(len(journal.done), len(self.segments))
        config = cast(Any, serialization.config)
        with (
            config.patch({"save.compute_crc32": False}),  # the files have checksums
            ThreadPoolExecutor(1, "read") as reader,
            ThreadPoolExecutor(1, "check") as checker,
        ):
            arrived = self._read_ahead([span for number in todo for span in self.segments[number]], reader)
            pending: Future[Segment] | None = None
            for number in todo:
                written = self._write(number, arrived)
                if pending is not None:
                    journal.add(pending.result())
                pending = checker.submit(self._check, written)
            if pending is not None:
                journal.add(pending.result())

    def _read_ahead(self, spans: Sequence[Span], reader: ThreadPoolExecutor) -> Iterator[tuple[Tensor, bytes]]:
        """Each span's rows and the xxh3s of their blocks; the next ones are read meanwhile."""
        upcoming = reader.submit(self._read, spans[0]) if spans else None
        for following in [*spans[1:], None]:
            if upcoming is not None:
                ready = upcoming.result()
                upcoming = reader.submit(self._read, following) if following is not None else None
                yield ready
                del ready  # before the next one is awaited

    def _read(self, span: Span) -> tuple[Tensor, bytes]:
        rows = self.source.read(span.name, span.low, span.high)
        return rows, digest.digest_blocks(rows, self._block(span.name))

    def _write(self, number: int, arrived: Iterator[tuple[Tensor, bytes]]) -> _Written:
        """Write a segment's files; they are not flushed yet."""
        out = _Written(number, Writer(self.folder))
        try:
            for span in self.segments[number]:
                rows, blocks = next(arrived)
                out.blocks.append(blocks)
                out.pieces.append([out.put(span, part, box) for box in self.boxes[span.name] if (part := _cut(rows, span, box))])
                self.wrote(rows.nbytes)
                del rows
        except BaseException:
            out.streams.close()
            raise
        return out

    def _check(self, written: _Written) -> Segment:
        """Flush a segment's files and read them back: every logical block has the xxh3 that it had in the source."""
        written.streams.close()
        blocks: dict[str, bytes] = {}
        for span, pieces, before in zip(self.segments[written.number], written.pieces, written.blocks, strict=True):
            if digest.digest_blocks(self._read_back(span, pieces), self._block(span.name)) != before:
                files = ", ".join(dict.fromkeys(piece.file for piece in pieces))
                raise DamagedCheckpoint(
                    f"{self.folder}: {span.name}, rows {span.low} to {span.high - 1}, was read back from {files} otherwise than "
                    "it was written; the disk or the memory of this machine is not sound"
                )
            blocks[span.name] = blocks.get(span.name, b"") + before
        return Segment(written.number, written.records, [p for pieces in written.pieces for p in pieces], blocks)

    def _read_back(self, span: Span, pieces: Sequence[StoredPiece]) -> Tensor:
        whole = self.source.shapes[span.name]
        shape = (span.high - span.low, *whole[1:]) if whole else ()
        out = torch.empty(shape, dtype=self.source.dtype(span.name))
        for piece in pieces:
            with (self.folder / piece.file).open("rb") as stream:
                view = cast(IO[bytes], _create_file_view(stream, piece.start, piece.length))
                values: Tensor = torch.load(view, map_location="cpu", weights_only=True)
            if piece.sizes == shape:
                return values
            places = [slice(o, o + s) for o, s in zip(piece.offsets, piece.sizes, strict=True)]
            if places:
                places[0] = slice(piece.offsets[0] - span.low, piece.offsets[0] - span.low + piece.sizes[0])
            out[tuple(places)] = values
        return out

    def _block(self, name: str) -> int:
        return digest.rows_per_block(self.source.shapes[name], self.source.dtype(name))


@dataclass
class _Written:
    """A segment whose files were written; `pieces` and `blocks` are by span."""

    number: int
    writer: Writer
    pieces: list[list[StoredPiece]] = field(default_factory=list)
    blocks: list[bytes] = field(default_factory=list)
    streams: ExitStack = field(default_factory=ExitStack)
    _open: dict[str, io.IOBase] = field(default_factory=dict)

    @property
    def records(self) -> Records:
        """Of the files, once `streams` is closed."""
        return self.writer.records

    def put(self, span: Span, part: Part, box: Box) -> StoredPiece:
        """Append a part to the file of its rank."""
        name = f"__{box.rank}_{self.number}.distcp"
        if name not in self._open:
            fs = cast(Any, self.writer.fs)
            self._open[name] = self.streams.enter_context(fs.create_stream(fs.concat_path(self.writer.path, name), "wb"))
        stream = self._open[name]
        start = stream.tell()
        torch.save(part.values, cast(IO[bytes], stream))
        return StoredPiece(span.name, part.offsets, part.sizes, name, start, stream.tell() - start)


@dataclass(frozen=True)
class Part:
    """What a span has of a box; the storage of `values` has as many elements."""

    offsets: Shape
    sizes: Shape
    values: Tensor


def _cut(rows: Tensor, span: Span, box: Box) -> Part | None:
    if not box.sizes:
        return Part((), (), rows)
    low, high = max(span.low, box.offsets[0]), min(span.high, box.offsets[0] + box.sizes[0])
    if low >= high:
        return None
    inner = [slice(o, o + s) for o, s in zip(box.offsets[1:], box.sizes[1:], strict=True)]
    values = rows[(slice(low - span.low, high - span.low), *inner)]
    if values.is_contiguous():  # the same memory under a storage of its own
        values = torch.frombuffer(byte_view(values), dtype=values.dtype).view(values.shape)
    return Part((low, *box.offsets[1:]), tuple(values.shape), values.contiguous())
