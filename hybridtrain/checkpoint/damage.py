"""Whether the files of a checkpoint still have the sizes and checksums in its `checkpoint.json`."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hybridtrain.checkpoint.info import INFO
from hybridtrain.checkpoint.saved import Saved
from hybridtrain.errors import CheckpointError
from hybridtrain.files.durable import FileRecord, file_record
from hybridtrain.settings.tree import VerifyLevel


def damage(
    where: Path | Saved,
    level: VerifyLevel,
    share: int = 0,
    shares: int = 1,
    alive: Callable[[], None] = lambda: None,
) -> list[str]:
    """Why the checkpoint `where` cannot be used: one line for each file of it, and of its base, that has
    changed.

    `level`: "sizes" compares their sizes, "full" also their checksums. With `shares` only the files of number
    `share` are looked at, of as many shares of about equal bytes. `alive` is called for every part that was
    read.
    """
    saved, problems = Saved.of(where), []
    try:
        files = [(saved.path / name, record) for name, record in saved.info["files"].items()]
        if saved.base is not None:
            files += [(saved.base.path / name, record) for name, record in saved.base.info["files"].items()]
    except CheckpointError as error:
        return [str(error)]
    if saved.base is not None:
        base, theirs = saved.base.path, saved.base.info
        if theirs.get("base"):
            problems.append(f"{base / INFO}: is based on another one, and cannot be a base")
        if theirs["xxh3"] != (wanted := saved.info["base"]["xxh3"]):
            problems.append(
                f"{base / INFO}: is another base: it has xxh3 {theirs['xxh3']}, must have {wanted}"
            )
    loads = [(0, number) for number in range(shares)]  # a heap: the share with the fewest bytes first
    for file, record in sorted(files, key=lambda f: (-f[1]["size"], str(f[0]))):
        load, least = loads[0]
        heapq.heapreplace(loads, (load + record["size"] + 1, least))
        if least == share and (problem := _problem(file, record, level, alive)):
            problems.append(f"{file}: {problem}")
    return problems


def _problem(file: Path, record: dict[str, Any], level: VerifyLevel, alive: Callable[[], None]) -> str:
    size, xxh3 = record["size"], record["xxh3"]
    try:
        found = file_record(file, alive) if level == "full" else FileRecord(file.stat().st_size, xxh3)
    except FileNotFoundError:
        return f"is missing; it had {size} bytes with xxh3 {xxh3}"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if found == FileRecord(size, xxh3):
        return ""
    if level == "full":
        return (
            f"is damaged: it has {found.size} bytes with xxh3 {found.xxh3}, must have {size} with xxh3 {xxh3}"
        )
    return f"is damaged: it has {found.size} bytes, must have {size}"
