"""A run with its faults, attempt by attempt: what the injected ranks and their judge know of it."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PHASES = (
    "restore",
    "data",
    "fetch",
    "forward",
    "backward",
    "push",
    "reduce",
    "optimizer",
    "validation",
    "save",
)
PIPELINE_PHASES = (
    "restore",
    "data",
    "fetch",
    "pipeline",
    "push",
    "reduce",
    "optimizer",
    "validation",
    "save",
)


@dataclass(frozen=True)
class Fault:
    """What goes wrong in one attempt.

    kind     of the rank: kill, stop, hang (a lock that nobody opens), nan (its first layer's output from then
    on), fail (its file
             operations from then on) of all ranks: kill all; abandon (the others are stopped, then it is
             killed); pause (the others are stopped for a while) of the disk: fill, vanish and cut (a data
             shard); before the attempt truncate, flip, delete (a file of the latest checkpoint)
    when     a phase ("restore" is "data" where there is nothing to restore), "file" or "start"
    number   the n-th time, from 1
    delay    seconds later than that; of "start" the moment itself
    """

    kind: str
    rank: int
    when: str = "start"
    number: int = 1
    delay: float = 0.0

    def __str__(self) -> str:
        if self.kind in DAMAGE:
            return f"{self.kind} a file of the latest checkpoint"
        at = f"{self.delay:.1f} s after the start" if self.when == "start" else f"{self.when} {self.number}"
        return f"{self.kind}, rank {self.rank} at {at}"


DAMAGE = ("truncate", "flip", "delete")


@dataclass(frozen=True)
class Story:
    """A run with its faults, attempt by attempt. `base`: attempts made by earlier commands."""

    folder: Path  # holds data/, disk/run/, the events and what ranks print
    settings: dict[str, Any]
    attempts: tuple[tuple[Fault, ...], ...]
    seed: int
    base: int = 0

    @property
    def run(self) -> Path:
        return self.folder / "disk" / "run"

    @property
    def shard(self) -> Path:
        """The first data shard."""
        return self.folder / "data" / "train-00000.tokens"

    def signal_others(self, number: int) -> None:
        """Signal all ranks of this attempt but this one."""
        for path in self.folder.glob("pid-*"):
            if path.name != f"pid-{os.environ['RANK']}":
                os.kill(int(path.read_text()), number)

    def note(self, **values: Any) -> None:
        """Add an event; safe from several processes."""
        handle = os.open(self.folder / "events.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, (json.dumps(values) + "\n").encode())
        os.close(handle)

    def events(self) -> list[dict[str, Any]]:
        path = self.folder / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def write(self) -> Path:
        """For ranks that torchrun starts."""
        path = self.folder / "story.pickle"
        path.write_bytes(pickle.dumps(self))
        return path


def committed(run: Path) -> str | None:
    """The name of the latest checkpoint, by the file that says so."""
    with contextlib.suppress(OSError):
        return (run / "checkpoints" / "latest").read_text().strip()
    return None
