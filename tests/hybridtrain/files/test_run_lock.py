"""Locks as runs hold them: on their folder and on their checkpoints, over all their ranks."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

from hybridtrain.errors import UserError
from hybridtrain.files.lock import NAME, FolderInUse, locked
from hybridtrain.parallel.collectives import Group
from hybridtrain.run import loop as module_of_train
from hybridtrain.run.loop import train
from hybridtrain.run.run_folder import RunLocks
from hybridtrain.settings.tree import Settings
from tests.console import hybridtrain
from tests.hybridtrain.files.test_lock import OTHER_HOST, lie_there, names
from tests.ranks import run_on_ranks
from tests.training import TINY, ci_settings, train_here


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("held", ["run", "there", "elsewhere/run", "elsewhere/linked", "elsewhere/new"])
def test_a_run_is_refused_while_another_holds_its_folder_or_its_checkpoints(
    ci_data: Path, tmp_path: Path, held: str
) -> None:
    """Whose own checkpoints they are, as well: that one holds its run folder, which may be no more than
    begun.
    """
    key = "run.dir" if held == "run" else "checkpoint.dir"
    where = [f"checkpoint.dir={tmp_path / held}"] if held == "there" else []
    (tmp_path / held).mkdir(parents=True)
    if held.startswith("elsewhere"):
        theirs = tmp_path / held / "checkpoints"
        if not held.endswith("new"):
            (tmp_path / held / "settings.toml").touch()
        if held.endswith("linked"):
            theirs.mkdir()
            (tmp_path / "link").symlink_to(theirs)
            theirs = tmp_path / "link"
        where = [f"checkpoint.dir={theirs}"]
    settings = ci_settings(tmp_path / "run", ci_data, *where)
    with locked(tmp_path / held):
        before = contents(tmp_path)
        with pytest.raises(FolderInUse, match=rf"^{key}=\S+ is in use by process {os.getpid()} on"):
            train(settings)
        assert contents(tmp_path) == before
    assert not isinstance(signal.getsignal(signal.SIGTERM), FunctionType)  # as it was


def test_two_runs_whose_checkpoints_are_links_to_one_folder_do_not_run_at_once(
    ci_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoints").symlink_to(tmp_path / "disk")
    lock = RunLocks(ci_settings(tmp_path / "one", ci_data), Group("world", (0,), 0))
    lock.take()
    try:
        with pytest.raises(
            FolderInUse,
            match=rf"^{tmp_path}/two/checkpoints, a link to {tmp_path}/disk, is in use by process",
        ):
            train(ci_settings(tmp_path / "two", ci_data))
    finally:
        lock.release()
    assert names(tmp_path / "disk") == []


def taken_over(settings: Settings, step: int) -> str:
    """On a rank: train; before step `step`, nothing being saved, another host's run takes the folder. Returns
    how the run ends.
    """
    real = module_of_train.train_step

    def train_step(run: Any, number: int, *rest: Any, **named: Any) -> Any:
        if number + 1 == step and run.mesh.rank == 0:
            while not (Path(settings.run.dir) / "checkpoints/latest").exists():
                time.sleep(0.01)
            lie_there(Path(settings.run.dir), **OTHER_HOST)
        return real(run, number, *rest, **named)

    module_of_train.train_step = train_step  # type: ignore[assignment]
    try:
        train_here(settings, False)
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_run_that_was_taken_over_does_not_save_and_ends(
    ci_data: Path, tmp_path: Path, background: str
) -> None:
    run, ways = (
        tmp_path / "run",
        [*TINY, "train.steps=6", "train.eval_every=0", "checkpoint.every=2"],
    )
    settings = ci_settings(
        run, ci_data, *ways, f"checkpoint.background={background}", "parallel.ep=2", "parallel.mem=2"
    )
    for message in run_on_ranks(taken_over, 2, settings, 4):
        assert re.match(
            r"CheckpointError: .*/step-00000004: the checkpoint of step 4 could not be written", message
        ), message
        assert re.search(r"rank 0: LockLost: .* was taken over by process \d+ on node7 since ", message), (
            message
        )
    assert names(run / "checkpoints") == ["latest", "step-00000002"]
    assert b"node7" in (run / NAME).read_bytes()
    if background == "false":
        assert not hybridtrain("eval", run).status  # who only reads needs no lock


def test_after_a_crash_the_next_run_goes_on_at_once_and_lets_go_at_its_end(
    ci_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = ci_settings(run, ci_data, *TINY, "train.steps=2", "train.eval_every=0")
    lie_there(run, pid=2**22 + 1)
    run_on_ranks(train_here, 1, settings, None)
    assert NAME not in names(run)


def take_together(run: str, kernels: list[str]) -> str:
    """On a rank of two, each on a host of its own: take the locks of a run whose dead holder was on one of
    the hosts.
    """
    from hybridtrain.files import holder
    from hybridtrain.parallel.collectives import barrier
    from tests.parallel.groups import mesh_here

    mesh = mesh_here(dp_shard=2)
    holder._kernel = lambda: kernels[mesh.rank]
    locks = RunLocks(Settings.model_validate({"run": {"dir": run}}), mesh.world)
    begin = time.monotonic()
    locks.take()
    assert time.monotonic() - begin < 5
    locks.confirm(at_once=True)
    content = (Path(run) / NAME).read_text()
    barrier(mesh.world)  # all have read it
    locks.release()
    return content


def test_any_rank_may_know_that_the_holder_is_dead(tmp_path: Path) -> None:
    """Rank 0 may be started anew on another host than the one on which it was killed."""
    lie_there(tmp_path / "run", kernel="second", began="1")
    contents = run_on_ranks(take_together, 2, str(tmp_path / "run"), ["first", "second"])
    assert '"kernel":"first"' in contents[0]
