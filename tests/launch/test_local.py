"""The launcher: ranks end together, the first failure decides the status, and signals reach the ranks."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridtrain.errors import TrainingError
from hybridtrain.launch import local
from hybridtrain.launch.cores import usable_cores
from hybridtrain.launch.local import RENDEZVOUS, RESTARTS, STALLED, USER_ERROR, Launcher, run_ranks
from hybridtrain.parallel.layout import Degrees, Layout
from tests.ranks import PRELOAD
from tests.training import CI

HERE = "tests.launch.test_local"


def launch(name: str, *arguments: object, nproc: int = 2, threads: int = 1) -> int:
    return run_ranks(f"{HERE}:{name}", arguments, nproc, threads=threads, preload=PRELOAD)


def rank() -> int:
    return int(os.environ["RANK"])


def note_environment(folder: str) -> None:
    import torch

    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", RENDEZVOUS)
    noted = {name: os.environ[name] for name in names} | {
        "threads": torch.get_num_threads(),
        "frozen": gc.get_freeze_count(),
    }
    noted["cores"] = sorted(os.sched_getaffinity(0))
    (Path(folder) / f"rank-{rank()}.json").write_text(json.dumps(noted))


def fail_on(number: int, kind: str) -> None:
    """One rank fails; the other would run for a minute."""
    if rank() != number:
        time.sleep(60)
    elif kind == "user":
        raise TrainingError("the loss is nan")
    elif kind == "layout":
        Layout.resolve(2, Degrees(ep=3))
    elif kind == "exit":
        os._exit(7)
    elif kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("a bug")


def fail_with_a_follower(folder: str, first: int, kind: str) -> None:
    """Rank `first` fails, and the other because of it a moment later, before the launcher can end it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (Path(folder) / f"ready-{rank()}").write_text("")
    mark = Path(folder) / "failed"
    while not (mark.exists() if rank() != first else (Path(folder) / f"ready-{1 - first}").exists()):
        time.sleep(0.01)
    if rank() == first:
        mark.write_text("")
        raise TrainingError("the reason") if kind == "user" else ValueError("the reason")
    time.sleep(0.03)
    raise OSError("connection closed by peer")


def fail_at_first(folder: str, mark: str, how: str) -> None:
    """Fails in the first attempt, after the other rank has begun, and notes the arguments and the count of
    restarts.
    """
    noted = Path(folder) / f"{os.environ[RESTARTS]}-{rank()}"
    noted.write_text(mark)
    if noted.name[0] != "0":
        return
    while not (Path(folder) / f"0-{1 - rank()}").exists():
        time.sleep(0.01)
    if how == "stall" and rank() == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "stall":
        local.end_rank("error: rank 0 stands still", STALLED)
    elif rank() == 1:
        fail_on(1, how)
    time.sleep(60)


def ignore_termination() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if rank() == 0:
        time.sleep(0.5)
        raise TrainingError("over")
    time.sleep(60)


def wait_for_a_signal(folder: str) -> None:
    """Ends in good order on SIGTERM, as a training rank does."""
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    (Path(folder) / f"ready-{rank()}").write_text("")
    deadline = time.monotonic() + 60
    while not received and time.monotonic() < deadline:
        time.sleep(0.01)
    (Path(folder) / f"done-{rank()}").write_text(str(received))


def test_ranks_get_torchruns_environment(tmp_path: Path) -> None:
    assert launch("note_environment", str(tmp_path), nproc=3, threads=2) == 0
    noted = [json.loads((tmp_path / f"rank-{i}.json").read_text()) for i in range(3)]
    assert [(n["RANK"], n["LOCAL_RANK"], n["WORLD_SIZE"], n["LOCAL_WORLD_SIZE"]) for n in noted] == [
        (str(i), str(i), "3", "3") for i in range(3)
    ]
    assert {n["threads"] for n in noted} == {2}
    assert all(n["frozen"] > 100_000 for n in noted)  # torch's objects, which a collection would copy
    assert len({n[RENDEZVOUS] for n in noted}) == 1
    assert noted[0][RENDEZVOUS].startswith("file:///")
    assert not Path(noted[0][RENDEZVOUS].removeprefix("file://")).parent.exists()  # nothing is left behind
    assert launch("note_environment", str(tmp_path), nproc=1, threads=0) == 0
    assert json.loads((tmp_path / "rank-0.json").read_text())["threads"] == len(usable_cores())


@pytest.mark.skipif(len(usable_cores()) < 2, reason="needs two cores")
def test_ranks_keep_to_their_own_cores(tmp_path: Path) -> None:
    def cores(bind: bool) -> list[list[int]]:
        assert Launcher(2, 1, bind, PRELOAD).run(f"{HERE}:note_environment", (str(tmp_path),)) == 0
        return [json.loads((tmp_path / f"rank-{i}.json").read_text())["cores"] for i in range(2)]

    own, all_cores = cores(bind=True), sorted(usable_cores())
    assert sorted(own[0] + own[1]) == all_cores
    assert len(own[0]) == len(all_cores) // 2
    assert cores(bind=False) == [all_cores, all_cores]


@pytest.mark.parametrize(
    ("kind", "status", "message"),
    [
        ("user", USER_ERROR, "error: the loss is nan\n"),
        (
            "layout",
            USER_ERROR,
            "error: layout does not fit 2 ranks\n  parallel.ep=3 does not divide dp_shard x cp x tp = 2; ",
        ),
        ("bug", 1, "rank 1 failed:\nTraceback (most recent call last):\n"),
        ("exit", 7, ""),
        ("kill", 128 + signal.SIGKILL, "rank 1 was ended by SIGKILL\n"),
    ],
)
def test_the_failing_rank_decides_and_ends_the_others(
    kind: str, status: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    begin = time.monotonic()
    assert launch("fail_on", 1, kind) == status
    assert time.monotonic() - begin < 25  # the other rank was not waited for
    err = capfd.readouterr().err
    assert err.startswith(message)
    assert ("Traceback" in err) == (kind == "bug")
    assert kind != "bug" or "RuntimeError: a bug" in err


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    ("kind", "status", "message"),
    [
        ("bug", 1, "rank {} failed first, 1 other(s) after it:\nTraceback"),
        ("user", USER_ERROR, "error: the reason\n"),
    ],
)
def test_the_first_failure_is_the_one_that_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], first: int, kind: str, status: int, message: str
) -> None:
    assert launch("fail_with_a_follower", str(tmp_path), first, kind) == status
    err = capfd.readouterr().err
    assert err.startswith(message.format(first))
    assert "the reason" in err
    assert "connection closed" not in err


@pytest.mark.parametrize(
    ("how", "status", "message"),
    [
        ("kill", 0, "rank 1 was ended by SIGKILL\nstatus 137: restart 1 of at most 2\n"),
        ("exit", 0, "status 7: restart 1 of at most 2\n"),
        ("stall", 0, "error: rank 0 stands still\nstatus 3: restart 1 of at most 2\n"),
        ("user", USER_ERROR, "error: the loss is nan\n"),
    ],
)
def test_ranks_are_started_again_but_not_after_what_the_user_has_to_mend(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], how: str, status: int, message: str
) -> None:
    begin = time.monotonic()
    folder, target = str(tmp_path), f"{HERE}:fail_at_first"
    arguments, again = (folder, "first", how), (folder, "again", how)
    assert Launcher(2, 1, preload=PRELOAD).run(target, arguments, 2, again) == status
    assert time.monotonic() - begin < 25  # nor is a stopped rank waited for
    noted = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert noted == {"0-0": "first", "0-1": "first"} | ({} if status else {"1-0": "again", "1-1": "again"})
    assert capfd.readouterr().err == message


def test_restarts_come_to_an_end(capfd: pytest.CaptureFixture[str]) -> None:
    target, arguments = f"{HERE}:fail_on", (0, "exit")
    assert run_ranks(target, arguments, 2, threads=1, preload=PRELOAD, restarts=1) == 7
    assert capfd.readouterr().err == "status 7: restart 1 of at most 1\n"


class Ending:
    """A rank whose exit code is seen at the `after`-th look."""

    pid = None

    def __init__(self, name: str, code: int, after: int) -> None:
        self.name, self._code, self._left = name, code, after

    def is_alive(self) -> bool:
        self._left -= 1
        return self._left > 0

    @property
    def exitcode(self) -> int | None:
        return None if self._left > 0 else self._code


@pytest.mark.parametrize(
    ("codes", "status", "said"),
    [
        (
            (1, -signal.SIGKILL),
            137,
            "rank 1 was ended by SIGKILL\n",
        ),  # killed first; its end was seen later, on a busy machine
        ((1, -signal.SIGTERM), 1, ""),  # by the launcher, since rank 0 failed
        ((-signal.SIGSEGV, 1), 139, "rank 0 was ended by SIGSEGV\n"),
        ((1, 3), 1, ""),
    ],
)
def test_a_killed_rank_is_the_cause_also_where_its_end_is_seen_after_that_of_others(
    codes: tuple[int, int],
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(local, "_POLL_SECONDS", 0.0)
    assert (
        local._wait([Ending(f"rank {number}", code, 3 + 4 * number) for number, code in enumerate(codes)])
        == status
    )  # type: ignore[misc]
    assert capfd.readouterr().err == said


def test_a_rank_that_does_not_end_is_killed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "_GRACE_SECONDS", 1.0)
    begin = time.monotonic()
    assert launch("ignore_termination") == USER_ERROR
    assert time.monotonic() - begin < 25
    assert "error: over" in capfd.readouterr().err


def test_a_signal_to_the_launcher_reaches_every_rank(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom hybridtrain.launch.local import run_ranks\nif __name__ == '__main__': "
        f"sys.exit(run_ranks({HERE + ':wait_for_a_signal'!r}, ({str(tmp_path)!r},), 2, threads=1))"
    )
    root = str(Path(__file__).parents[2])
    launcher = subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": root}
    )
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("ready-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(30) == 0
    finally:
        launcher.kill()
    assert sorted(p.name for p in tmp_path.glob("done-*")) == ["done-0", "done-1"]
    assert {p.read_text() for p in tmp_path.glob("done-*")} == {str([int(signal.SIGTERM)])}


def test_a_launched_run_saves_on_sigusr1_and_stops_on_sigterm_and_says_how_to_go_on(tmp_path: Path) -> None:
    from tests.training import make_data

    data, run = make_data(tmp_path / "data"), tmp_path / "run"
    arguments = [
        "launch",
        "--nproc",
        "2",
        str(CI),
        f"run.dir={run}",
        f"data.path={data}",
        "train.steps=2000",
        "train.eval_every=0",
    ]
    arguments += ["checkpoint.every=0"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "hybridtrain", *arguments, "parallel.ep=2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            metrics = run / "metrics.jsonl"
            if metrics.exists() and metrics.read_text().count("\n") >= 3:
                break
            time.sleep(0.05)
        launcher.send_signal(signal.SIGUSR1)
        latest = run / "checkpoints/latest"
        while time.monotonic() < deadline and not latest.exists():
            time.sleep(0.05)
        saved, lines = int(latest.read_text().removeprefix("step-")), metrics.read_text().count("\n")
        while time.monotonic() < deadline and metrics.read_text().count("\n") < lines + 2:
            time.sleep(0.05)
        launcher.send_signal(signal.SIGTERM)
        out, err = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
    assert launcher.returncode == 0, err
    assert "Traceback" not in err
    summary = json.loads((run / "summary.json").read_text())
    assert summary["stopped"] is True
    assert 3 <= saved < summary["steps"] < 2000
    assert (run / "checkpoints" / f"step-{saved:08d}").is_dir()
    assert f"stopped after step {summary['steps']} (SIGTERM asked for it)" in out
    assert "the checkpoint is written, go on with --resume" in out
    assert (run / "checkpoints/latest").read_text() == f"step-{summary['steps']:08d}"
