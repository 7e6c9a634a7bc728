"""The terminal's view of a preparation."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hybridtrain.console import console

if TYPE_CHECKING:
    from hybridtrain.data.documents import Piece


class EncodingProgress:
    """A bar over the bytes of the source files, with documents and megabytes of text a second."""

    def __init__(self, total_bytes: int, enabled: bool) -> None:
        self._progress = Progress(
            TextColumn("encoding"),
            BarColumn(),
            TextColumn("{task.fields[documents]:,} documents  {task.fields[rate]:.1f} MB/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not enabled,
        )
        self._task = self._progress.add_task("encoding", total=total_bytes, documents=0, rate=0.0)
        self._documents = self._text_bytes = self._finished_bytes = 0

    def __enter__(self) -> EncodingProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, piece: Piece, text_bytes: int) -> None:
        """Count one encoded piece of `text_bytes` bytes."""
        self._documents += piece.first
        self._text_bytes += text_bytes
        elapsed = self._progress.tasks[0].elapsed or 1e-9
        self._progress.update(
            self._task,
            completed=self._finished_bytes + piece.position,
            documents=self._documents,
            rate=self._text_bytes / 1e6 / elapsed,
        )

    def finish_file(self, file_bytes: int) -> None:
        """Count a source file as read to its end."""
        self._finished_bytes += file_bytes
