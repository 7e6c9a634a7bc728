"""Folders that a run cannot write to, each told with its setting."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hybridtrain.errors import TrainingError
from hybridtrain.run import writable as folders
from hybridtrain.run.loop import train
from hybridtrain.run.writable import unusable_folders
from hybridtrain.settings.load import parse_settings
from tests.training import TINY, ci_settings


def found(*overrides: str) -> list[str]:
    return unusable_folders(parse_settings({}, list(overrides)))


def test_new_and_old_folders_and_urls_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert (
        found(f"run.dir={tmp_path / 'a/b'}", f"data.path={tmp_path / 'data'}", "checkpoint.dir=memory://run")
        == []
    )
    assert found(f"run.dir={tmp_path}", f"data.path={tmp_path / 'new'}", 'data.source=["shipped:sotu"]') == []


def test_files_in_the_way_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    file, below, link = tmp_path / "file", tmp_path / "file/x/y", tmp_path / "dangling"
    wanted = 'data.source=["shipped:sotu"]'
    assert found(f"run.dir={link}", f"checkpoint.dir=file://{below}", f"data.path={file}") == [
        f"run.dir={link}: {link} is not a folder; choose another run.dir",
        f"checkpoint.dir={below}: {file} is not a folder; choose another checkpoint.dir",
        f"data.path={file}: is not a folder; it must be one that `hybridtrain data` wrote, or a new one "
        "with data.source",
    ]
    assert found(f"run.dir={tmp_path}", f"data.path={below}", wanted) == [
        f"data.path={below}: {file} is not a folder; choose another data.path"
    ]


def test_files_in_the_place_of_a_runs_own_folders_are_named(tmp_path: Path) -> None:
    for name in ("checkpoints", "tensorboard"):
        (tmp_path / name).write_text("")
    expected = [
        f"run.dir={tmp_path}: {tmp_path / n} is not a folder; choose another run.dir"
        for n in ("checkpoints", "tensorboard")
    ]
    assert found(f"run.dir={tmp_path}") == expected
    assert found(f"run.dir={tmp_path}", f"checkpoint.dir={tmp_path / 'there'}") == expected[1:]


def test_names_of_no_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    loop, below, long = tmp_path / "loop", tmp_path / "loop/x", tmp_path / ("q" * 300)
    wanted = 'data.source=["shipped:sotu"]'
    assert found(f"run.dir={loop}", f"checkpoint.dir={below}", f"data.path={long}", wanted) == [
        f"run.dir={loop}: Too many levels of symbolic links; choose another run.dir",
        f"checkpoint.dir={below}: Too many levels of symbolic links; choose another checkpoint.dir",
        f"data.path={long}: File name too long; choose another data.path",
    ]
    assert found(f"run.dir={long}", f"data.path={loop}") == [
        f"run.dir={long}: File name too long; choose another run.dir",
        f"data.path={loop}: Too many levels of symbolic links; choose another data.path",
    ]


def test_runs_do_not_lie_in_their_data(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    inside = tmp_path / "link/data/run"
    expected = (
        f"={inside}: lies in data.path={tmp_path / 'data'}, which holds prepared data alone; choose another "
        "folder"
    )
    assert found(f"run.dir={inside}", f"checkpoint.dir={inside}", f"data.path={tmp_path / 'data'}") == [
        f"run.dir{expected}",
        f"checkpoint.dir{expected}",
    ]
    assert len(found(f"run.dir={tmp_path}", f"data.path={tmp_path}")) == 1


def test_a_folder_that_may_not_be_written_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept").mkdir(mode=0o555)
    if os.geteuid() == 0:  # root may write anywhere: asked as another user would be
        monkeypatch.setattr(folders.os, "access", lambda path, mode: bool(Path(path).stat().st_mode & 0o222))
    assert found(f"run.dir={tmp_path / 'kept/run'}") == [
        f"run.dir={tmp_path / 'kept/run'}: {tmp_path / 'kept'} may not be written to by this user; choose "
        "another run.dir"
    ]


def test_a_folder_in_the_place_of_a_runs_file_ends_it_with_a_message(ci_data: Path, tmp_path: Path) -> None:
    (tmp_path / "run/metrics.jsonl").mkdir(parents=True)
    with pytest.raises(
        TrainingError, match=r"run/metrics.*: Is a directory; the last good checkpoint is none$"
    ):
        train(ci_settings(tmp_path / "run", ci_data, *TINY))
