"""Which checkpoints a run may go on from, and which may go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybridtrain import checkpoint
from hybridtrain.checkpoint.history import begin_folder, folder_of, prune, staging_of
from hybridtrain.checkpoint.storage import remove_folder
from hybridtrain.errors import DamagedCheckpoint

DESCRIPTION: dict[str, Any] = {  # all that a checkpoint.json must say
    "format": checkpoint.FORMAT,
    "step": 0,
    "sequences": 0,
    "identity": {},
    "vocab_size": 9,
    "separator_id": 0,
    "tokenizer_digest": "",
    "addressing": None,
    "table_scalars": None,
    "settings": {},
    "files": {},
}


def commit(folder: Path, step: int, base: int | None = None, content: str = "", **more: Any) -> Path:
    final = folder_of(folder, step)
    staging = staging_of(final)
    begin_folder(staging)
    (staging / "file").write_text(content)
    info = DESCRIPTION | {"step": step, **more}
    if base is not None:
        theirs = checkpoint.read_info(folder_of(folder, base))
        info["base"] = {"name": folder_of(folder, base).name, "xxh3": theirs["xxh3"], "age": 1}
    checkpoint.commit_folder(staging, final, info)
    return final


@pytest.fixture(params=["folder", "url"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return (
        tmp_path / "c"
        if request.param == "folder"
        else checkpoint.open_storage(f"memory://{tmp_path.name}/c")
    )


def test_a_commit_makes_it_the_latest(folder: Path) -> None:
    assert checkpoint.latest(folder) is None
    assert checkpoint.candidates(folder) == []
    one = commit(folder, 1)
    assert checkpoint.latest(folder) == one
    two = commit(folder, 2)
    assert checkpoint.candidates(folder) == [two, one]
    assert {p.name for p in folder.iterdir()} == {"latest", "step-00000001", "step-00000002"}


def test_what_is_unfinished_is_never_read_and_cleaned_away(folder: Path) -> None:
    one = commit(folder, 1)
    staging = staging_of(folder_of(folder, 2))
    begin_folder(staging)
    (staging / "file").write_text("half")
    assert checkpoint.candidates(folder) == [one]
    assert checkpoint.latest(folder) == one
    three = commit(folder, 3)
    prune(folder, 3, keep_last=5, keep_every=0)
    assert {p.name for p in folder.iterdir()} == {"latest", one.name, three.name}


def test_after_the_latest_there_are_only_lines_that_were_given_up(folder: Path) -> None:
    for step in (1, 2, 3):
        commit(folder, step)
    again = commit(folder, 2, content="of the new line")
    assert [p.name for p in checkpoint.candidates(folder)] == ["step-00000002", "step-00000001"]
    assert (again / "file").read_text() == "of the new line"
    prune(folder, 2, keep_last=1, keep_every=0)
    assert steps_of(folder) == [2, 3]


def steps_of(folder: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in folder.iterdir() if p.name.startswith("step-"))


@pytest.mark.parametrize("content", [None, "", "step-", "elsewhere"])
def test_without_a_latest_all_are_candidates(folder: Path, content: str | None) -> None:
    for step in (1, 2):
        commit(folder, step)
    (folder / "latest").unlink() if content is None else (folder / "latest").write_text(content)
    assert checkpoint.latest(folder) is None
    assert [p.name for p in checkpoint.candidates(folder)] == ["step-00000002", "step-00000001"]


@pytest.mark.parametrize(
    "harm", [lambda path: (path / checkpoint.INFO).unlink(), remove_folder], ids=["its info", "all of it"]
)
def test_a_latest_that_is_lost_is_a_candidate_and_what_was_given_up_is_none(
    folder: Path, harm: Callable[[Path], None]
) -> None:
    for step in (1, 2, 3):
        commit(folder, step)
    harm(commit(folder, 2))  # of the new line
    assert checkpoint.latest(folder) is None
    assert [p.name for p in checkpoint.candidates(folder)] == ["step-00000002", "step-00000001"]
    with pytest.raises(DamagedCheckpoint, match=f"{checkpoint.INFO} is missing"):
        checkpoint.verify(folder_of(folder, 2), "full")


def test_the_last_and_those_of_every_so_many_steps_stay(folder: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        commit(folder, step)
        prune(folder, step, keep_last=2, keep_every=20)
    assert steps_of(folder) == [20, 40, 50]


def test_a_base_stays_as_long_as_it_is_needed(folder: Path) -> None:
    commit(folder, 1)
    commit(folder, 2, base=1)
    commit(folder, 3, base=1)
    prune(folder, 3, keep_last=1, keep_every=0)
    assert steps_of(folder) == [1, 3]
    commit(folder, 4)
    prune(folder, 4, keep_last=1, keep_every=0)
    assert steps_of(folder) == [4]


def test_nothing_goes_while_it_is_unknown_what_is_needed(folder: Path) -> None:
    for step in (1, 2):
        commit(folder, step)
    (folder_of(folder, 2) / checkpoint.INFO).write_text("{")
    prune(folder, 2, keep_last=1, keep_every=0)
    assert steps_of(folder) == [1, 2]
