"""One process writes to a folder; whoever is gone holds nothing, and nobody else is taken for gone."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hybridtrain.errors import DataError
from hybridtrain.files import lock as module
from hybridtrain.files.holder import Holder
from hybridtrain.files.lock import NAME, FolderInUse, FolderLock, LockLost, locked
from hybridtrain.formats.folder import new_folder

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
