"""Names who waits for whom where a run stands still, and ends it. docs/reliability.md shows what it says.

A thread of every rank looks whether its main thread goes on: whether it begins collectives (the ledger of
parallel/collectives.py) and phases of the step (metrics.py). A rank that does neither for most of `timeout`
writes down where it is into a folder of the run that all ranks look at; so do the others then. A process that
is stopped, or gone, writes nothing, and is named for that. Nothing is written, and nothing sent, as long as
the run goes on.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from hybridtrain.files.durable import write_atomically
from hybridtrain.launch.local import STALLED, end_rank
from hybridtrain.monitor.clock import Clock
from hybridtrain.parallel.collectives import Group
from hybridtrain.parallel.traffic import SEND, Call

_NOTICED, _SAID = 0.8, 0.9  # shares of the timeout after which a rank writes its record, and ends the run
_TICKS, _LOOK = 20, 3  # a timeout's ticks; those between two looks at the others' records
_FRAMES, _SHOWN = 6, 8


@dataclass(frozen=True)
class Record:
    """Where a rank stands. `still`: seconds without progress. `calls`: its last collective in every group,
    newest first.

    `number` rises as long as the rank can write.
    """

    rank: int
    number: int
    host: str
    step: int
    phase: str
    still: float
    calls: tuple[Call, ...]
    stack: str  # innermost frames of its main thread

    @classmethod
    def read(cls, path: Path) -> Record:
        values = json.loads(path.read_text(encoding="utf-8"))
        values["calls"] = tuple(Call(group, tuple(ranks), *rest) for group, ranks, *rest in values["calls"])
        return cls(**values)


class Watchdog:
    """While entered, ends the run by `end(report, status)` once this rank has stood still for `timeout`
    seconds.

    `folder` is the same on all ranks; it is made when it is needed. One rank alone waits for nobody and
    is not watched.
    """

    def __init__(
        self,
        world: Group,
        clock: Clock,
        folder: Path,
        timeout: float,
        end: Callable[[str, int], object] = end_rank,
    ) -> None:
        self.world, self.clock, self.folder, self.timeout, self.end = world, clock, folder, timeout, end
        self._number, self._heard = 0, dict[int, int]()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.world.size > 1:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        tick = min(5.0, self.timeout / _TICKS)
        still, seen, at, ticks = 0.0, self._progress(), time.monotonic(), 0
        while not self._closed.wait(tick):
            now = time.monotonic()
            still += min(
                now - at, 2 * tick
            )  # a process that was suspended with all others did not stand still
            at, ticks = now, ticks + 1
            if (progress := self._progress()) != seen:
                still, seen, ticks = 0.0, progress, 0
            noticed = still >= _NOTICED * self.timeout
            with contextlib.suppress(OSError):  # a disk that fails must not keep it from ending the run
                self._speak(noticed, still)
            if noticed and ticks % _LOOK == 0 and not self._others_go_on() and still >= _SAID * self.timeout:
                self.end(f"error: {self._report(still)}", STALLED)
                return

    def _progress(self) -> tuple[int, int]:
        return self.world.traffic.calls, self.clock.entered

    def _speak(self, noticed: bool, still: float) -> None:
        """Write this rank's record where it or another stands still; take it back when all go on."""
        mine = self._place("rank", ".json")
        asked = self._place("still", "")
        if noticed and not asked.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            asked.touch()
        elif not noticed:
            asked.unlink(missing_ok=True)
        if not any(self.folder.glob("still-*")):
            mine.unlink(missing_ok=True)
            return
        if not mine.exists():
            with self._place("rank", ".stacks.txt").open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        self._number += 1
        write_atomically(mine, json.dumps(asdict(self._record(still))).encode())

    def _others_go_on(self) -> bool:
        """Whether another rank says that it makes progress, and has said so again since the last look: a slow
        disk, for one.
        """
        others = {
            r.rank: r for r in self._records() if r.rank != self.world.rank and r.still < self.timeout / 2
        }
        going_on = [rank for rank, record in others.items() if record.number != self._heard.get(rank)]
        self._heard = {rank: record.number for rank, record in others.items()}
        return bool(going_on)

    def _records(self) -> list[Record]:
        records = []
        for path in sorted(self.folder.glob("rank-*.json")):
            with contextlib.suppress(
                OSError, ValueError, TypeError, KeyError, RecursionError
            ):  # taken back just now, or no record
                records.append(Record.read(path))
        return records

    def _record(self, still: float) -> Record:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "".join(traceback.format_list(traceback.extract_stack(frame)[-_FRAMES:])).rstrip()
        calls = tuple(
            call._replace(at=round(time.monotonic() - call.at, 1)) for call in self.world.traffic.last_calls()
        )
        return Record(
            self.world.rank,
            self._number,
            socket.gethostname(),
            self.clock.step,
            self.clock.current,
            round(still, 1),
            calls,
            stack,
        )

    def _place(self, what: str, suffix: str) -> Path:
        return self.folder / f"{what}-{self.world.rank:05d}{suffix}"

    def _report(self, still: float) -> str:
        text = f"no progress for {still:.0f} s (parallel.timeout={self.timeout:g}): "
        try:
            text += f"{explain(self._records(), self.world.size)}\n"
            text += f"records and stacks of the ranks that could speak: {self.folder}"
            write_atomically(self._place("report-of-rank", ".txt"), text.encode())
        except OSError as error:
            text += (
                f"{self.folder} cannot be used ({error.strerror}), so this is rank {self.world.rank} alone:\n"
            )
            text += f"{_line(record := self._record(still))}\n{record.stack}"
        return text


def explain(records: Sequence[Record], world: int) -> str:
    """In words, who keeps whom waiting, by what the `world` ranks wrote down; the first line
    names the cause.
    """
    speaking = {record.rank: record for record in records}
    silent = [rank for rank in range(world) if rank not in speaking]
    late = late_ranks(records)
    if silent:
        cause = f"{_named(silent)} gave no sign: stopped, hung in one call of C, or gone"
    elif late:
        (rank, call), *others = late.items()
        cause = f"rank {rank} has not come to {_call(call)}, where others wait"
        cause += f"; also waited for: {_named(list(dict(others)))}" if others else ""
    else:
        cause = "all ranks have come to all collectives, and none ends"
    first = [rank for rank in late if rank in speaking]
    lines = [_line(speaking[rank]) for rank in [*first, *(r for r in speaking if r not in first)][:_SHOWN]]
    more = [f"  and {len(speaking) - _SHOWN} more"] if len(speaking) > _SHOWN else []
    stack = [
        f"stack of rank {rank}'s main thread:\n{speaking[rank].stack}" for rank in [*first, *speaking][:1]
    ]
    return "\n".join([cause, *lines, *more, *stack])


def late_ranks(records: Sequence[Record]) -> dict[int, Call]:
    """The ranks that have begun fewer collectives in a group than another of its ranks, with the first that
    they lack.

    The rank that began its last collective first is the first: it keeps others waiting, whom still others
    wait for.
    """
    counts: dict[tuple[str, tuple[int, ...]], dict[int, Call]] = {}
    for record in records:
        for call in record.calls:
            counts.setdefault((call.group, call.ranks), {})[record.rank] = call
    out: dict[int, Call] = {}
    for (_, members), calls in counts.items():
        most = max(calls.values(), key=lambda call: call.number)
        for record in records:
            mine = calls[record.rank].number if record.rank in calls else 0
            if record.rank in members and mine < most.number and record.rank not in out:
                out[record.rank] = most._replace(number=mine + 1) if mine + 1 < most.number else most
    newest = {record.rank: max((-call.at for call in record.calls), default=0.0) for record in records}
    return dict(sorted(out.items(), key=lambda late: newest[late[0]]))


def _line(record: Record) -> str:
    last = (
        f"its last collective is {_call(record.calls[0])}, {record.calls[0].at:g} s ago"
        if record.calls
        else "no collective yet"
    )
    phase = record.phase or "between phases"
    return f"  rank {record.rank} on {record.host}: step {record.step}, {phase}; {last}"


def _call(call: Call) -> str:
    who = "rank {} to rank {}".format(*call.ranks) if call.operation == SEND else _named(call.ranks)
    return f"{call.operation} number {call.number} of group {call.group} ({who})"


def _named(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 3, 5`."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:_SHOWN]))}{'…' * (len(ranks) > _SHOWN)}"
