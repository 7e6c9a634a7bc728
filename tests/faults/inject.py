"""Faults in a training rank: what happens, on which rank, and when. The trainer itself knows nothing of them.

A moment is the n-th entry of a phase of the loop (metrics.Clock), the n-th time that a file of the run is made, renamed or
removed (by Python's audit events, in whatever thread), or a time after the start.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hybridtrain.launch.local import RESTARTS

PHASES = ("data", "fetch", "forward", "backward", "push", "reduce", "optimizer", "validation", "save")
STORY = "HYBRIDTRAIN_TEST_STORY"  # for ranks that torchrun starts: the file that `main` reads


@dataclass(frozen=True)
class Fault:
    """What goes wrong in one attempt.

    kind     kill, stop, hang (a lock that nobody opens), fail (file operations from then on), fill (the disk), vanish (a shard),
             truncate, flip, delete (a file of the latest checkpoint, before the attempt)
    when     a phase, "file" or "start"
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
        return f"{self.kind} rank {self.rank} at {at}"


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


def rank_of(story: Story, resume: bool | None) -> None:
    """On a rank of a launcher: `hybridtrain train` with this attempt's fault."""
    from hybridtrain.run_folder import RunFolder
    from hybridtrain.settings import Settings
    from hybridtrain.train import train

    rank, attempt = int(os.environ["RANK"]), story.base + int(os.environ[RESTARTS])
    log = os.open(story.folder / "ranks.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if rank == 0:
        story.note(event="attempt", attempt=attempt)
    real = RunFolder.restore

    def restore(folder: RunFolder, *rest: Any) -> int:
        step = real(folder, *rest)
        if rank == 0:
            story.note(event="resumed", attempt=attempt, step=step)
        return step

    RunFolder.restore = restore  # type: ignore[method-assign]
    for number, fault in enumerate(story.attempts[attempt] if attempt < len(story.attempts) else ()):
        if fault.rank == rank:
            arm(story, fault, {"event": "fired", "attempt": attempt, "number": number})
    train(Settings.model_validate(story.settings), resume)


def arm(story: Story, fault: Fault, event: dict[str, Any]) -> None:
    """Let the fault happen in this process when its moment comes."""
    if fault.kind in DAMAGE:
        if (path := damage(story, fault)) is not None:
            story.note(**event, committed=path.parent.name, file=str(path))
        return
    act: Callable[[], Any] = {
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
        "hang": lambda: threading.Event().wait(),
        "fail": fail,
        "fill": lambda: fill(story),
        "vanish": lambda: next((story.folder / "data").glob("train-*.tokens")).unlink(),
    }[fault.kind]

    happened: list[None] = []

    def fire() -> None:
        if not happened:
            happened.append(story.note(**event, committed=committed(story.run)))
        act()

    def later() -> None:
        time.sleep(fault.delay)
        fire()

    moment = fire if not fault.delay else lambda: threading.Thread(target=later, daemon=True).start()
    if fault.when == "start":
        moment()
    elif fault.when == "file":
        at_file(story.run, fault.number, fire)
    else:
        at_phase(fault.when, fault.number, moment)


def at_phase(name: str, number: int, act: Callable[[], Any]) -> None:
    """Call `act` when this phase is entered for the n-th time."""
    from hybridtrain.metrics import Clock

    real, left = Clock.phase, number

    @contextlib.contextmanager
    def phase(clock: Clock, entered: str) -> Iterator[None]:
        nonlocal left
        with real(clock, entered):
            if entered == name:
                left -= 1
                if left == 0:
                    act()
            yield

    Clock.phase = phase  # type: ignore[method-assign]


def at_file(folder: Path, number: int, act: Callable[[], Any]) -> None:
    """Call `act` before a file below `folder` is made, renamed or removed for the n-th time and, where it lets it, every later one.

    TensorBoard's files do not count: it writes in a thread of its own, at any time.
    """
    root, left = str(folder), number

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "open":
            path, mode, flags = args
            writes = any(c in mode for c in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            path, writes = args[0] if args else "", event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
        if writes and isinstance(path, (str, os.PathLike)) and str(path).startswith(root) and "tensorboard" not in str(path):
            left -= 1
            if left <= 0:
                act()

    sys.addaudithook(watch)


def fail() -> NoReturn:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def fill(story: Story) -> None:
    """Leave little room on the small disk that the story lies on: sometimes a part of a checkpoint fits, sometimes nothing."""
    disk = story.folder / "disk"
    room = random.Random(f"{story.seed} {len(story.events())}").randrange(0, 64 * 1024)
    (disk / "ballast").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - room)))


def damage(story: Story, fault: Fault) -> Path | None:
    """Harm a file of the latest checkpoint that is whole, as fault.kind says; a copy is kept. None where there is none."""
    harmed = {folder.name for folder, _ in harmed_checkpoints(story)}
    last = committed(story.run)
    whole = [p for p in sorted((story.run / "checkpoints").glob("step-*")) if p.name not in harmed and last and p.name <= last]
    if not whole:
        return None
    folder = whole[-1]
    shutil.copytree(folder, story.folder / "intact" / f"{folder.name}.{folder.stat().st_ino}")
    draw = random.Random(f"{story.seed} {fault.number} {folder.name}")
    path = draw.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    content = bytearray(path.read_bytes())
    if fault.kind == "delete":
        path.unlink()
    elif fault.kind == "truncate":
        path.write_bytes(content[: draw.randrange(len(content))])
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    return path


def harmed_checkpoints(story: Story) -> list[tuple[Path, Path]]:
    """Those that `damage` has harmed and no later save has replaced, each with its copy."""
    copies = [(copy, *copy.name.split(".")) for copy in (story.folder / "intact").glob("step-*")]
    folders = [(story.run / "checkpoints" / name, copy, int(inode)) for copy, name, inode in copies]
    return [(folder, copy) for folder, copy, inode in folders if folder.exists() and folder.stat().st_ino == inode]


def committed(run: Path) -> str | None:
    """The name of the latest checkpoint, by the file that says so."""
    with contextlib.suppress(OSError):
        return (run / "checkpoints" / "latest").read_text().strip()
    return None


if __name__ == "__main__":  # as torchrun starts it
    from hybridtrain.errors import UserError

    try:
        rank_of(pickle.loads(Path(os.environ[STORY]).read_bytes()), None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
