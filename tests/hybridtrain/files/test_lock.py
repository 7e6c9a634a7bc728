"""One process writes to a folder; whoever is gone holds nothing, and nobody else is taken for gone."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

from hybridtrain.errors import DataError, UserError
from hybridtrain.files import lock as module
from hybridtrain.files.holder import Holder
from hybridtrain.files.lock import NAME, FolderInUse, FolderLock, LockLost, locked
from hybridtrain.formats.folder import new_folder
from hybridtrain.parallel.collectives import Group
from hybridtrain.run import loop as module_of_train
from hybridtrain.run.loop import train
from hybridtrain.run.run_folder import RunLocks
from hybridtrain.settings.tree import Settings
from tests.console import hybridtrain
from tests.ranks import run_on_ranks
from tests.training import TINY, ci_settings, train_here

OTHER_HOST = {"host": "node7", "kernel": "another kernel"}


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats and patience of hundredths of seconds."""
    for name, seconds in (("BEAT", 0.05), ("STALE", 0.4), ("POLL", 0.02), ("SETTLE", 0.01)):
        monkeypatch.setattr(module, name, seconds)


def lie_there(folder: Path, age: float = 0.0, **changes: Any) -> Holder:
    """A lock of a holder that is not this process, touched `age` seconds ago."""
    holder = Holder.here().model_copy(update=changes)
    folder.mkdir(exist_ok=True)
    (folder / NAME).write_text(holder.model_dump_json())
    os.utime(folder / NAME, (time.time() - age,) * 2)
    return holder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process of this machine that holds tmp_path / "run"."""
    code = "import sys, time\nfrom pathlib import Path\nfrom hybridtrain.files.lock import locked\n"
    code += "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


def test_the_second_is_refused_and_told_who_holds_it_and_the_file_goes_with_the_holder(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    with locked(folder):
        assert names(folder) == [NAME]
        told = (
            rf"run is in use by process {os.getpid()} on \S+ since \d{{4}}-.* UTC \(.+\); wait for it, end "
            r"it, or choose another"
        )
        with pytest.raises(FolderInUse, match=told), locked(folder):
            pass
        with pytest.raises(DataError, match=told), locked(folder, error=DataError):
            pass
        (folder / "something").touch()
    assert names(folder) == ["something"]
    with pytest.raises(KeyboardInterrupt), locked(folder):
        raise KeyboardInterrupt
    with locked(tmp_path / "new"):
        pass
    assert names(tmp_path) == ["run"]  # a folder made for nothing but the lock goes as well


def test_a_killed_holder_holds_nothing_and_a_stopped_one_does(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    other.send_signal(signal.SIGSTOP)
    with pytest.raises(FolderInUse, match=f"process {other.pid} on"), locked(tmp_path / "run"):
        pass
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # not waited for yet: it is a zombie
    begin = time.monotonic()
    with locked(tmp_path / "run"):
        assert time.monotonic() - begin < 1
        assert names(tmp_path / "run") == [NAME]


def test_sigterm_lets_go_before_it_ends_the_process(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    other.terminate()
    assert other.wait(30) == -signal.SIGTERM
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"began": "1"}, {"pid": 2**22 + 1}], ids=["number used again", "gone"])
def test_on_this_machine_a_dead_holder_is_known_at_once(tmp_path: Path, changes: dict[str, Any]) -> None:
    lie_there(tmp_path, **changes)
    with locked(tmp_path):
        assert names(tmp_path) == [NAME]


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("changes", [OTHER_HOST, {"kernel": ""}], ids=["another host", "no /proc"])
def test_a_holder_that_cannot_be_seen_is_dead_once_it_does_not_beat(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    lie_there(tmp_path, age=3600, **changes)
    with locked(tmp_path):
        pass
    lie_there(tmp_path, age=-3600, **changes)  # by a clock that is an hour before ours: nobody compares them
    begin = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - begin > module.STALE


@pytest.mark.usefixtures("soon")
def test_a_holder_on_another_host_that_beats_is_refused(tmp_path: Path) -> None:
    lie_there(tmp_path, **OTHER_HOST)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            os.utime(tmp_path / NAME)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(FolderInUse, match="on node7 since"), locked(tmp_path):
        pass
    threading.Timer(0.5, ended.set).start()
    with locked(tmp_path, wait=True):  # until it beats no more
        assert ended.is_set()
    thread.join()


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    "content",
    [b"", b"[" * 5000, b'{"token": "../../x"}', b"\x80\x02c"],
    ids=["empty", "deep", "path", "pickle"],
)
def test_a_file_that_is_no_lock_holds_nothing_for_long(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    with locked(tmp_path):
        assert names(tmp_path) == [NAME]


def test_of_many_that_find_a_dead_holder_one_gets_the_folder(tmp_path: Path) -> None:
    for _ in range(20):
        lie_there(tmp_path, began="1")
        locks, taken, start = (
            [FolderLock(tmp_path / NAME) for _ in range(8)],
            list[FolderLock](),
            threading.Barrier(8),
        )

        def attempt(
            lock: FolderLock, taken: list[FolderLock] = taken, start: threading.Barrier = start
        ) -> None:
            start.wait()
            for _ in range(5):
                if lock.attempt().taken:
                    taken.append(lock)
                    return

        threads = [threading.Thread(target=attempt, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(taken) == 1
        taken[0].confirm(at_once=True)
        taken[0].release()
        assert names(tmp_path) == []


def test_an_heir_that_died_on_the_way_keeps_nobody_out(tmp_path: Path) -> None:
    dead = lie_there(tmp_path, began="1")
    (left := tmp_path / f"{NAME}.0123").touch()
    os.utime(left, (0, 0))
    (tmp_path / f"{NAME}.{dead.token}.heir").write_text(
        Holder.here().model_copy(update={"began": "2"}).model_dump_json()
    )
    with locked(tmp_path):
        assert names(tmp_path) == [NAME]


@pytest.mark.usefixtures("soon")
def test_a_holder_that_was_taken_over_while_it_stood_still_ends_and_leaves_the_heirs_lock(
    tmp_path: Path,
) -> None:
    with locked(tmp_path) as mine:
        mine.confirm()
        heir = lie_there(tmp_path, **OTHER_HOST)
        with pytest.raises(
            LockLost,
            match=r"was taken over by process \d+ on node7 since .*It ends, so that no two write there",
        ):
            mine.confirm(at_once=True)
        with pytest.raises(LockLost):
            mine.confirm()
    assert Holder.parse((tmp_path / NAME).read_bytes(), "") == heir


@pytest.mark.usefixtures("soon")
def test_a_holder_beats_and_takes_its_lock_again_where_somebody_removed_it(tmp_path: Path) -> None:
    with locked(tmp_path) as mine:
        os.utime(tmp_path / NAME, (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / NAME).stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (tmp_path / NAME).unlink()
        mine.confirm(at_once=True)
        assert names(tmp_path) == [NAME]


def test_without_hard_links_the_file_is_made_exclusively(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    with locked(tmp_path):
        assert names(tmp_path) == [NAME]
        with pytest.raises(FolderInUse), locked(tmp_path):
            pass
    lie_there(tmp_path, began="1")
    with locked(tmp_path):
        assert names(tmp_path) == [NAME]


@pytest.mark.usefixtures("soon")
def test_letting_go_leaves_all_else_at_a_url(tmp_path: Path) -> None:
    upath = pytest.importorskip("upath")
    for folder in (upath.UPath("memory://kept/run"), upath.UPath(f"local://{tmp_path}/run")):
        with locked(folder):
            (folder / "step").write_bytes(b"saved")
        assert (folder / "step").read_bytes() == b"saved"
        assert not (folder / NAME).exists()


@pytest.mark.usefixtures("soon")
def test_at_a_url_the_lock_is_an_object_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    upath = pytest.importorskip("upath")
    folder = upath.UPath("memory://lock/run")
    with locked(folder) as mine:
        with pytest.raises(FolderInUse, match=f"process {os.getpid()} on"), locked(folder):
            pass
        mine.confirm(at_once=True)
        far = Holder.here().model_copy(update=OTHER_HOST)
        (folder / NAME).write_bytes(far.model_dump_json().encode())
        with pytest.raises(LockLost, match="on node7"):
            mine.confirm(at_once=True)
    with locked(folder):  # far does not beat
        assert Holder.parse((folder / NAME).read_bytes(), "") != far
    assert not (folder / NAME).exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(FolderInUse, match="file: cannot be written: Not a directory"),
        locked(tmp_path / "file"),
    ):
        pass


def test_what_makes_a_folder_holds_it(tmp_path: Path) -> None:
    out = tmp_path / "model"
    with new_folder(out) as making:
        (making / "weights").touch()
        with pytest.raises(FolderInUse, match="model is in use by process"), new_folder(out):
            pass
        assert (making / "weights").exists()  # it was removed before by whoever came second
    assert names(tmp_path) == ["model"]


def test_the_journal_of_a_reshard_begins_in_a_folder_that_has_the_lock_alone(tmp_path: Path) -> None:
    from hybridtrain.reshard.journal import Journal

    with locked(tmp_path / "out"), Journal(tmp_path / "out", {}) as journal:
        assert journal.done == []
    assert names(tmp_path / "out") == ["reshard.jsonl"]


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
