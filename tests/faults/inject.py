"""Faults in a training rank, each when its moment comes. The trainer itself knows nothing of them.

A moment is the n-th entry of a phase of the loop (metrics.Clock), the n-th time that a file of the run is
made, renamed or removed (by Python's audit events, in whatever thread), or a time after the start.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hybridtrain.launch.local import RESTARTS
from tests.faults.acts import ACTS, damage
from tests.faults.story import DAMAGE, Fault, Story, committed

STORY = "HYBRIDTRAIN_TEST_STORY"  # for ranks that torchrun starts: the file that `main` reads


def rank_of(story: Story, resume: bool | None) -> None:
    """On a rank of a launcher: `hybridtrain train` with this attempt's fault."""
    from hybridtrain.run.loop import train
    from hybridtrain.run.run_folder import RunFolder
    from hybridtrain.settings.tree import Settings

    rank, attempt = int(os.environ["RANK"]), story.base + int(os.environ[RESTARTS])
    log = os.open(story.folder / "ranks.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    (story.folder / f"pid-{rank}").write_text(str(os.getpid()))
    if rank == 0:
        story.note(event="attempt", attempt=attempt)
    real = RunFolder.restore

    def restore(folder: RunFolder, *rest: Any) -> dict[str, Any]:
        info = real(folder, *rest)
        if rank == 0:
            story.note(event="resumed", attempt=attempt, step=info["step"])
        return info

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
    happened: list[None] = []

    def fire() -> None:
        if not happened:
            happened.append(story.note(**event, committed=committed(story.run)))
        ACTS[fault.kind](story)

    def later() -> None:
        time.sleep(fault.delay)
        fire()

    moment = fire if not fault.delay else lambda: threading.Thread(target=later, daemon=True).start()
    if fault.when == "start":
        moment()
    elif fault.when == "file":
        at_file(story.run, fault.number, fire, torn=fault.kind == "kill" and fault.number % 2 == 0)
    else:
        at_phase(fault.when, fault.number, moment)


def at_phase(name: str, number: int, act: Callable[[], Any]) -> None:
    """Call `act` when this phase is entered for the n-th time; a new run has no restore, but data."""
    from hybridtrain.monitor.clock import Clock

    real, left = Clock.phase, number
    names = (name, "data") if name == "restore" else (name,)

    @contextlib.contextmanager
    def phase(clock: Clock, entered: str) -> Iterator[None]:
        nonlocal left
        with real(clock, entered):
            if entered in names:
                left -= 1
                if left == 0:
                    act()
            yield

    Clock.phase = phase  # type: ignore[method-assign]


def at_file(folder: Path, number: int, act: Callable[[], Any], torn: bool) -> None:
    """Call `act` before a file below `folder` is made, renamed or removed for the n-th time and, where it
    lets it, every later one.

    `torn`: as if it were called behind that, where the file is one that is opened to be written anew: it is
    empty then. TensorBoard's files do not count: it writes in a thread of its own, at any time.
    """
    root, left = str(folder), number

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "open":
            path, mode, flags = args
            writes = (
                any(c in mode for c in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
        else:
            path, writes = (
                args[0] if args else "",
                event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"),
            )
        if (
            writes
            and isinstance(path, (str, os.PathLike))
            and str(path).startswith(root)
            and "tensorboard" not in str(path)
        ):
            left -= 1
            if left <= 0:
                if torn and event == "open" and mode and "w" in mode and os.path.exists(path):
                    os.truncate(path, 0)
                act()

    sys.addaudithook(watch)


if __name__ == "__main__":  # as torchrun starts it
    from hybridtrain.errors import UserError

    try:
        rank_of(pickle.loads(Path(os.environ[STORY]).read_bytes()), None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
