"""Where a run's checkpoints are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridtrain import checkpoint
from hybridtrain.errors import CheckpointError
from hybridtrain.run_folder import SETTINGS, find_checkpoint
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


def test_where_there_is_none_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a run folder with a finished checkpoint nor a checkpoint"):
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
