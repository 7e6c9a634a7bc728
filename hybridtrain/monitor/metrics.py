"""What a run reports: metrics.jsonl, TensorBoard and the terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from hybridtrain.files.lock import LockLost
from hybridtrain.files.untrusted import UntrustedFileError, read_bytes

METRICS = "metrics.jsonl"
_MAX_METRICS = 1 << 30  # bytes


class MetricsLog:
    """Rank 0's record of the run in its folder; other ranks hold one that does nothing.

    A resumed run first drops every line after the step it goes on from, so that the file always is one curve.
    `confirm` raises LockLost where the folder is another run's now: nothing is written then; the saver tells
    all ranks that the run ends.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        resumed_at: int,
        total_steps: int,
        confirm: Callable[[], None] = lambda: None,
    ) -> None:
        self.active, self.confirm = rank == 0, confirm
        if not self.active:
            return
        self._run_dir = run_dir
        self._open(resumed_at)
        self.console = Console()
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=resumed_at, note="")
        self._progress.start()

    def _open(self, resumed_at: int, validated: bool = True) -> None:
        self._file = _open_truncated(self._run_dir / METRICS, resumed_at, validated)
        board = self._run_dir / "tensorboard"
        _wait_for_a_later_name(board)
        self._board = SummaryWriter(str(board), purge_step=resumed_at + 1)

    def rewind(self, step: int, validated: bool = True) -> None:
        """Drop every line after this step, which the run goes on from, and also its validation's where not
        `validated`.
        """
        if self.active and not self._lost():
            self._file.close()
            self._board.close()
            self._open(step, validated)

    def _lost(self) -> bool:
        try:
            self.confirm()
        except LockLost:
            return True
        return False

    def step(self, step: int, note: str) -> None:
        """Move the progress bar."""
        if self.active:
            self._progress.update(self._task, completed=step, note=note)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and every number of it in TensorBoard; a list of shares is one histogram
        there.
        """
        if not self.active or self._lost():
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, list):
                self._add_bars(name, value, step)
            elif isinstance(value, (int, float)):
                self._board.add_scalar(name, value, step)

    def _add_bars(self, name: str, heights: list[float], step: int) -> None:
        """A histogram with a bar of its height for each place of the list: bar i lies between i and i + 1."""
        count, places = len(heights), range(len(heights))
        total, squares = (
            sum(i**power * height for i, height in zip(places, heights, strict=True)) for power in (1, 2)
        )
        ends = [float(i + 1) for i in places]
        self._board.add_histogram_raw(
            name, 0.0, float(count), sum(heights), total, squares, ends, heights, step
        )

    def say(self, text: Any) -> None:
        if self.active:
            self.console.print(text, highlight=False, soft_wrap=isinstance(text, str))

    def close(self) -> None:
        if self.active:
            self._progress.stop()
            self._file.close()
            self._board.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; what is not such a line, as one cut off by a crash, is left out.

    Raises UntrustedFileError where the file is longer than any run's, or not UTF-8.
    """
    lines = []
    path = run_dir / METRICS
    try:
        text = read_bytes(path, _MAX_METRICS).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UntrustedFileError(f"{path}: is not UTF-8 at byte {error.start}") from None
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict) and type(values.get("step")) is int:
            lines.append(values)
    return lines


def measure_matmul_peak(device: torch.device, size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of this rank's fastest of a few square matrix products in the compute dtype: the peak that
    shares refer to.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def _wait_for_a_later_name(board: Path, at_most: float = 2.0) -> None:
    """Wait until a new event file sorts behind those that are there; in seconds, at most, for a clock that
    was set back.

    TensorBoard reads the files of a run in the order of their names and purges, from each one's first step
    on, what it read before. A name begins with its second and goes on with the process: of two starts within
    one second, process 99 sorts behind 100.
    """
    names = [path.name.split(".") for path in board.glob("events.out.tfevents.*")]
    latest = max((int(parts[3]) for parts in names if parts[3].isdecimal()), default=0)
    give_up_at = time.monotonic() + at_most
    while int(time.time()) <= latest and time.monotonic() < give_up_at:
        time.sleep(0.02)


def _open_truncated(path: Path, last_step: int, validated: bool) -> Any:
    kept = (
        [line for line in read_metrics(path.parent) if line["step"] <= last_step]
        if path.exists() and last_step
        else []
    )
    if not validated:
        kept = [line for line in kept if line["step"] < last_step or "validation_loss" not in line]
    rewritten = path.with_suffix(".new")
    rewritten.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    rewritten.replace(path)
    return open(path, "a", encoding="utf-8")
