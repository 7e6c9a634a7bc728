"""The terminal's view of a reshard."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class CopyProgress:
    """A bar over the bytes of the tensors, on stderr; `done` of them were copied before."""

    def __init__(self, total: int, done: int, show: bool) -> None:
        self._progress = Progress(
            TextColumn("resharding"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not show,
        )
        self._task = self._progress.add_task("copy", total=total, completed=done)

    def __enter__(self) -> CopyProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, num_bytes: int) -> None:
        self._progress.advance(self._task, num_bytes)
