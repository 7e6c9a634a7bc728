"""The checkpoints of a run, one beside the other: which is the latest, which are older, which are removed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hybridtrain.checkpoint.info import INFO, write_info
from hybridtrain.checkpoint.saved import Saved
from hybridtrain.checkpoint.storage import (
    flush_folder,
    is_local,
    make_folder,
    names_in,
    remove_folder,
    write_whole,
)
from hybridtrain.errors import CheckpointError
from hybridtrain.files.untrusted import UntrustedFileError, read_bytes

LATEST = "latest"
PREFIX = "step-"


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"{PREFIX}{step:08d}"


def latest(checkpoints: Path) -> Path | None:
    """The last committed checkpoint, or None."""
    path = _named(checkpoints)
    return path if path is not None and (path / INFO).is_file() else None


def candidates(checkpoints: Path) -> list[Path]:
    """The checkpoints that a run may go on from, best first: the latest and the finished ones before it.

    The latest is one of them also where its `checkpoint.json` is lost: it was committed, so it is damaged and
    not unfinished. Those after the latest belong to a line that was given up. Where `latest` names none, all
    finished ones are candidates.
    """
    last, finished = _named(checkpoints), _finished(checkpoints)
    before = [
        path for _, path in sorted(finished.items(), reverse=True) if last is None or path.name < last.name
    ]
    return before if last is None else [last, *before]


def _named(checkpoints: Path) -> Path | None:
    """The checkpoint that the file `latest` names, whether it exists or not; None where it names none."""
    try:
        name = read_bytes(checkpoints / LATEST, 1 << 10).decode("ascii").strip()
    except (OSError, UnicodeDecodeError, UntrustedFileError):
        return None
    return None if _step(name) is None else checkpoints / name


def staging_of(final: Path) -> Path:
    """The folder that the checkpoint `final` is written to before it is renamed; on an object store, which
    has no renames, `final` itself.
    """
    return final.with_name(f".{final.name}.partial") if is_local(final) else final


def begin_folder(staging: Path) -> None:
    """Make it an empty folder. What earlier saves left unfinished is removed."""
    for name in names_in(staging.parent):
        if name.startswith(f".{PREFIX}"):
            remove_folder(staging.parent / name)
    _remove(staging)
    make_folder(staging)


def commit_folder(staging: Path, final: Path, info: dict[str, Any]) -> str:
    """Make the files in `staging`, which `info` describes, the finished checkpoint `final` and the latest
    one.

    Returns the checksum of `checkpoint.json`.
    """
    xxh3 = write_info(staging, info)
    if staging != final:
        old = final.with_name(f".{final.name}.old")
        if final.exists():  # of a line that was given up: a run resumed from before this step writes it anew
            os.rename(final, old)
        os.rename(staging, final)
        flush_folder(final.parent)
        remove_folder(old)
    write_whole(final.parent / LATEST, final.name.encode())
    return xxh3


def prune(checkpoints: Path, step: int, keep_last: int, keep_every: int) -> None:
    """Remove the checkpoints that need not be kept now that the one of `step` is the latest, and those that
    were never finished.

    Kept are the last `keep_last`, those of every `keep_every`-th step, what they are based on, and those
    after `step`.
    """
    finished = _finished(checkpoints)
    before = sorted(s for s in finished if s <= step)
    kept = {
        s for s in finished if s > step or s in before[-keep_last:] or (keep_every and s % keep_every == 0)
    }
    try:
        bases = {base.path.name for s in kept if (base := Saved(finished[s]).base) is not None}
    except CheckpointError:
        return  # of one that cannot be read it is not known what it needs
    names = {finished[s].name for s in kept} | bases
    for name in names_in(checkpoints):
        if (theirs := _step(name)) is not None and theirs <= step and name not in names:
            _remove(checkpoints / name)


def _remove(path: Path) -> None:
    """Remove a checkpoint in such an order that a crash leaves an unfinished one."""
    (path / INFO).unlink(missing_ok=True)
    remove_folder(path)


def _finished(checkpoints: Path) -> dict[int, Path]:
    steps = {_step(name): checkpoints / name for name in names_in(checkpoints)}
    return {step: path for step, path in steps.items() if step is not None and (path / INFO).is_file()}


def _step(name: str) -> int | None:
    match = re.fullmatch(rf"{PREFIX}([0-9]{{1,18}})", name)
    return int(match[1]) if match is not None else None
