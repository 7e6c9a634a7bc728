"""Where a run's checkpoints are found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hybridtrain import checkpoint
from hybridtrain.errors import CheckpointError, SettingsError
from hybridtrain.run.run_folder import SETTINGS, find_checkpoint
from hybridtrain.settings.load import load_settings
from tests.hybridtrain.checkpoint.test_history import commit


def test_the_latest_of_a_run_is_found_here_or_elsewhere(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    one, two = (commit(run / "checkpoints", step) for step in (1, 2))
    (run / SETTINGS).touch()
    assert find_checkpoint(run) == (run, two)
    assert find_checkpoint(one) == (run, one)
    (run / "checkpoints/latest").unlink()
    assert find_checkpoint(run) == (run, two)
    (run / SETTINGS).write_text(f'[checkpoint]\ndir = "{elsewhere}"\n')
    five = commit(elsewhere, 5)
    assert find_checkpoint(run) == (run, five)


@pytest.mark.parametrize(
    "where", ["memory://x/c", "s3://bucket/run", "simplecache::http://host/x", "nowhere://x"]
)
def test_a_url_is_not_opened_on_a_files_word(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    commit(run / "checkpoints", 1)
    (run / SETTINGS).write_text(f'[checkpoint]\ndir = "{where}"\n')
    monkeypatch.setattr(checkpoint, "open_storage", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(
        CheckpointError, match=re.escape(f"{SETTINGS} says that the checkpoints lie at {where}, which is not")
    ):
        find_checkpoint(run)


def test_a_url_is_opened_where_it_is_asked_for(tmp_path: Path) -> None:
    there, run = checkpoint.open_storage(f"memory://{tmp_path.name}/c"), tmp_path / "run"
    saved = commit(there, 3, settings={"run": {"dir": str(run)}})
    run.mkdir()
    (run / SETTINGS).write_text(f'[checkpoint]\ndir = "memory://{tmp_path.name}/c"\n')
    assert find_checkpoint(there) == find_checkpoint(saved) == (run, saved)


@pytest.mark.parametrize(
    "text",
    [
        "\x00",
        "= 3",
        "a = " + "[" * 5000,
        ".".join("a" * 3000) + " = 1",
        "a = " + "9" * 5000,
        "checkpoint.dir = 3",
        "#" * 2**21,
    ],
)
def test_settings_that_cannot_be_read_are_named(text: str, tmp_path: Path) -> None:
    commit(tmp_path / "checkpoints", 1)
    (tmp_path / SETTINGS).write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / SETTINGS}")):
        find_checkpoint(tmp_path)
    with pytest.raises(SettingsError):
        load_settings(tmp_path / SETTINGS)


def test_a_folder_of_no_possible_name_is_named(tmp_path: Path) -> None:
    (tmp_path / SETTINGS).write_text(f'[checkpoint]\ndir = "{"x" * 5000}"\n')
    for path in (tmp_path, tmp_path / ("y" * 5000)):
        with pytest.raises(CheckpointError, match="cannot be read: File name too long"):
            find_checkpoint(path)


@pytest.mark.parametrize("name", ["step-²", "step-" + "9" * 5000, "../step-1", "step-1/../..", "\ud800", ""])
def test_a_latest_that_names_no_checkpoint_is_passed_over(name: str, tmp_path: Path) -> None:
    one = commit(tmp_path / "checkpoints", 1)
    (tmp_path / "checkpoints/latest").write_bytes(name.encode("utf-8", "surrogatepass"))
    assert find_checkpoint(tmp_path) == (tmp_path, one)


def test_where_there_is_none_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="neither a run folder with a finished checkpoint nor a checkpoint"
    ):
        find_checkpoint(tmp_path)


def test_a_latest_that_is_damaged_is_named_with_the_one_before(tmp_path: Path) -> None:
    two = commit(tmp_path / "checkpoints", 2)
    (two / checkpoint.INFO).unlink()
    with pytest.raises(CheckpointError) as alone:
        find_checkpoint(tmp_path)
    assert str(alone.value) == f"{two}, the latest of this run, is damaged: checkpoint.json is missing"
    one = commit(tmp_path / "checkpoints", 1)
    (tmp_path / "checkpoints/latest").write_text(two.name)
    with pytest.raises(CheckpointError, match=f"; the one before it is {one}$"):
        find_checkpoint(tmp_path)
