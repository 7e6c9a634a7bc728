"""Whether a run can write where its settings say, seen before anything is started."""

from __future__ import annotations

import os
from pathlib import Path

from hybridtrain import checkpoint
from hybridtrain.errors import SettingsError
from hybridtrain.settings.tree import Settings


def check_folders(settings: Settings, elsewhere: list[list[str]] | None = None) -> None:
    """Raise SettingsError listing every folder of the settings that cannot be what it should be.

    `elsewhere`: what `unusable_folders` found on each rank, so that all of them raise alike; None: looked for
    here.
    """
    found = elsewhere if elsewhere is not None else [unusable_folders(settings)]
    if problems := list(dict.fromkeys(problem for theirs in found for problem in theirs)):
        raise SettingsError("settings", problems)


def unusable_folders(settings: Settings) -> list[str]:
    """Why a run cannot write to `run.dir`, `checkpoint.dir` and, where it is to be made, `data.path`; one
    line each.
    """
    data, run = Path(settings.data.path), Path(settings.run.dir)
    written = {"run.dir": run}
    if settings.checkpoint.dir and isinstance(
        there := checkpoint.open_storage(settings.checkpoint.dir), Path
    ):
        written["checkpoint.dir"] = there
    out = [problem for key, folder in written.items() if (problem := _obstacle(key, folder))]
    if not out:
        ours = ["tensorboard"] if settings.checkpoint.dir else ["checkpoints", "tensorboard"]
        out += [problem for name in ours if (problem := _obstacle("run.dir", run, name))]
    if problem := _no_name("data.path", data):
        out.append(problem)
    elif os.path.lexists(data) and not data.is_dir():
        out.append(
            f"data.path={data}: is not a folder; it must be one that `hybridtrain data` wrote, or a new one "
            "with data.source"
        )
    elif settings.data.source and not data.exists() and (problem := _obstacle("data.path", data)):
        out.append(problem)
    for key, folder in written.items():
        # not Path's exists and resolve, which raise what was told above
        if (os.path.isdir(data) or not os.path.exists(data)) and _real(folder).is_relative_to(_real(data)):
            out.append(
                f"{key}={folder}: lies in data.path={data}, which holds prepared data alone; choose another "
                "folder"
            )
    return out


def _obstacle(key: str, folder: Path, inside: str = "") -> str:
    """Why the folder, or the one that is called `inside` in it, can neither be made nor be written to; ""
    where it can.
    """
    if problem := _no_name(key, folder):
        return problem
    there = next(
        path for path in (folder / inside, *(folder / inside).absolute().parents) if os.path.lexists(path)
    )
    if not there.is_dir():
        return f"{key}={folder}: {there} is not a folder; choose another {key}"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{key}={folder}: {there} may not be written to by this user; choose another {key}"
    return ""


def _no_name(key: str, folder: Path) -> str:
    """Why no folder can be found by this name: too long, or links in a circle; "" where one can, be it there
    or not.
    """
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        return f"{key}={folder}: {error.strerror}; choose another {key}"
    return ""


def _real(folder: Path) -> Path:
    return Path(os.path.realpath(folder))
