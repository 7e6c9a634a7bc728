"""Where checkpoints lie: a folder of this machine, or any URL that fsspec knows, as a path either way."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from hybridtrain.errors import SettingsError
from hybridtrain.files.durable import sync_file, sync_folder, write_atomically


def open_storage(where: str, key: str = "checkpoint.dir") -> Path:
    """The folder that `where` names; for a URL a UPath, which has the methods of Path but is not a Path.

    Raises SettingsError naming the setting `key` where nothing here can open such a URL.
    """
    if where.startswith("file://"):
        return Path(where.removeprefix("file://"))
    if "://" not in where:
        return Path(where)
    try:
        from upath import UPath

        path = UPath(where)
        path.fs  # noqa: B018  # opens the file system, which may need a package of its own
    except (ImportError, ValueError) as error:
        hint = "; URLs need the extra hybridtrain[url]" if isinstance(error, ModuleNotFoundError) else ""
        raise SettingsError(f"{key}={where}", [f"cannot be opened: {error}{hint}"]) from None
    return cast(Path, path)


def is_local(path: Path) -> bool:
    """Whether renames and flushes mean something there; an object store has neither, and puts objects
    whole.
    """
    return isinstance(path, Path)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves either the old or the new one."""
    if is_local(path):
        write_atomically(path, content)
    else:
        path.write_bytes(content)


def make_folder(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)


def flush_folder(path: Path) -> None:
    """Make what was written, renamed or removed in a folder durable."""
    if is_local(path):
        sync_folder(path)


def remove_folder(path: Path) -> None:
    """Remove a folder and all in it, where it exists."""
    if is_local(path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        remote = cast(Any, path)
        remote.fs.rm(remote.path, recursive=True)


def names_in(path: Path) -> Iterator[str]:
    """The names of the files and folders in a folder; none where there is no such folder."""
    try:
        yield from sorted(child.name for child in path.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return


def free_space(path: Path) -> str:
    """The free space, in words, on the disk of a folder that may not exist yet; "" for a URL."""
    if not is_local(path):
        return ""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    return f" ({shutil.disk_usage(there).free // 2**20} MiB free)"


def flush_file(stream: Any, path: Path) -> None:
    """Hand on what was written to the open file `path`, and make it durable where that means something."""
    if is_local(path):
        sync_file(stream)
    else:
        stream.flush()
