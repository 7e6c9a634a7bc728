"""Shares of cores: whole, disjoint, hardware threads of a core together; none where they would not do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hybridtrain.launch import cores
from hybridtrain.launch.cores import let_openmp_sleep, shares_of_cores, usable_cores


@pytest.mark.parametrize(("ranks", "threads"), [(2, 1), (3, 2), (4, 2), (7, 1), (8, 1)])
def test_all_cores_are_shared_out(ranks: int, threads: int) -> None:
    eight = [3, 7, 0, 4, 1, 5, 2, 6]
    shares = shares_of_cores(eight, ranks, threads)
    assert [core for share in shares for core in share] == eight
    sizes = [len(share) for share in shares]
    assert len(sizes) == ranks
    assert min(sizes) >= threads
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("ranks", "threads"), [(1, 1), (9, 1), (3, 3), (8, 2)])
def test_ranks_are_left_alone(ranks: int, threads: int) -> None:
    assert shares_of_cores(list(range(8)), ranks, threads) == [[]] * ranks


def test_nor_where_the_system_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_setaffinity")
    assert shares_of_cores([0, 1], 2, 1) == [[], []]
    monkeypatch.delattr(os, "sched_getaffinity")
    assert sorted(usable_cores()) == list(range(os.cpu_count() or 1))


def test_hardware_threads_of_a_core_stand_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 4, 5, 6, 7})
    monkeypatch.setattr(cores, "_CPUS", tmp_path)
    assert usable_cores() == [0, 1, 2, 4, 5, 6, 7]  # nothing is said of siblings
    for core in range(8):
        folder = tmp_path / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(
            f"{core % 4},{core % 4 + 4}\n" if core % 2 else f"{core % 4}-{core % 4 + 4}\n"
        )
    assert usable_cores() == [0, 4, 1, 5, 2, 6, 7]


@pytest.mark.parametrize(
    ("before", "after"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_openmp_sleeps_soon_unless_the_environment_says_otherwise(
    before: dict[str, str], after: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # what was there comes back behind the test
        monkeypatch.delenv(name)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    let_openmp_sleep(os.environ)
    assert os.environ.get("GOMP_SPINCOUNT") == after


def test_the_command_tells_openmp_before_torch_comes() -> None:
    code = (
        "import os, sys; from hybridtrain.cli import main; sys.argv = ['hybridtrain', '--help']\n"
        "try: main()\nexcept SystemExit: print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "10000 False"
