"""What faults do to their rank, to the others, and to the disk."""

from __future__ import annotations

import errno
import gc
import math
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from tests.faults.story import Fault, Story, committed

PAUSE_SECONDS = 2.5


def end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(_: Story) -> NoReturn:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def spoil(_: Story) -> None:
    """What the first mixer here gives is not finite from now on."""
    from hybridtrain.model.mixers.attention import Attention

    mixer = next(module for module in gc.get_objects() if isinstance(module, Attention))
    mixer.register_forward_hook(lambda module, inputs, output: output * math.nan)


def kill_all(story: Story) -> None:
    story.signal_others(signal.SIGKILL)
    end()


def abandon(story: Story) -> None:
    story.signal_others(signal.SIGSTOP)
    end()


def pause(story: Story) -> None:
    def go_on() -> None:
        time.sleep(PAUSE_SECONDS)
        story.signal_others(signal.SIGCONT)

    story.signal_others(signal.SIGSTOP)
    threading.Thread(target=go_on, daemon=True).start()


def fill(story: Story) -> None:
    """Leave little room on the small disk that the story lies on: sometimes a part of a checkpoint fits,
    sometimes nothing.
    """
    disk = story.folder / "disk"
    room = random.Random(f"{story.seed} {len(story.events())}").randrange(0, 64 * 1024)
    (disk / "ballast").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - room)))


def cut(story: Story) -> None:
    """Leave half of the shard. Half a copy takes its place: what is mapped and cut in the moment of a read
    ends the process.
    """
    half = story.shard.with_suffix(".half")
    half.write_bytes(story.shard.read_bytes()[: story.shard.stat().st_size // 2])
    half.replace(story.shard)


ACTS: dict[str, Callable[[Story], Any]] = {
    "kill": lambda _: end(),
    "stop": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda _: threading.Event().wait(),
    "nan": spoil,
    "fail": fail,
    "kill all": kill_all,
    "abandon": abandon,
    "pause": pause,
    "fill": fill,
    "vanish": lambda story: story.shard.unlink(),
    "cut": cut,
}


def damage(story: Story, fault: Fault) -> Path | None:
    """Harm a file of the latest checkpoint that is whole, as fault.kind says; a copy is kept. None where
    there is none.
    """
    harmed = {folder.name for folder, _ in harmed_checkpoints(story)}
    last = committed(story.run)
    whole = [
        p
        for p in sorted((story.run / "checkpoints").glob("step-*"))
        if p.name not in harmed and last and p.name <= last
    ]
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
    return [
        (folder, copy) for folder, copy, inode in folders if folder.exists() and folder.stat().st_ino == inode
    ]
