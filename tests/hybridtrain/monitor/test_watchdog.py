"""The watchdog: what ranks write down when one stands still, what is made of it, and that nothing happens
otherwise.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict
from pathlib import Path

import torch

from hybridtrain.launch.local import STALLED
from hybridtrain.monitor.clock import Clock
from hybridtrain.monitor.watchdog import Record, Watchdog, explain, late_ranks
from hybridtrain.parallel.collectives import Group
from hybridtrain.parallel.traffic import Call

PAIR, FOUR = (0, 1), (0, 1, 2, 3)


def record(rank: int, *calls: tuple[str, tuple[int, ...], str, int, float], phase: str = "forward") -> Record:
    return Record(rank, 1, "host", 7, phase, 4.0, tuple(Call(*call) for call in calls), f"stack of {rank}")


def test_a_rank_that_writes_nothing_is_named() -> None:
    text = explain([record(0, ("ep", PAIR, "all_to_all", 57, 4.0))], 2).splitlines()
    assert text == [
        "rank 1 gave no sign: stopped, hung in one call of C, or gone",
        "  rank 0 on host: step 7, forward; its last collective is all_to_all number 57 of group ep (ranks "
        "0, 1), 4 s ago",
        "stack of rank 0's main thread:",
        "stack of 0",
    ]


def test_a_rank_that_others_wait_for_is_named_with_the_collective_and_its_stack() -> None:
    waits = record(0, ("ep", PAIR, "all_to_all", 57, 4.0), ("world", PAIR, "all_reduce", 3, 6.0))
    hangs = record(
        1, ("world", PAIR, "all_reduce", 3, 6.0), ("ep", PAIR, "all_to_all", 56, 6.5), phase="optimizer"
    )
    text = explain([waits, hangs], 2)
    assert text.startswith(
        "rank 1 has not come to all_to_all number 57 of group ep (ranks 0, 1), where others wait\n"
    )
    assert (
        "rank 1 on host: step 7, optimizer; its last collective is all_reduce number 3 of group world" in text
    )
    assert text.endswith("stack of rank 1's main thread:\nstack of 1")


def test_in_a_chain_the_rank_that_stood_still_first_is_the_cause() -> None:
    records = [
        record(0, ("tp", (0, 1), "all_gather", 9, 2.0)),
        record(1, ("ep", (1, 3), "all_to_all", 5, 3.0), ("tp", (0, 1), "all_gather", 8, 5.0)),
        record(2, ("tp", (2, 3), "all_gather", 9, 2.0)),
        record(3, ("tp", (2, 3), "all_gather", 8, 5.0), ("ep", (1, 3), "all_to_all", 4, 6.0)),
    ]
    late = late_ranks(records)
    assert list(late) == [3, 1]
    assert (late[3].group, late[3].number) in (("ep", 5), ("tp", 9))
    text = explain(records, 4)
    assert text.startswith("rank 3 has not come to")
    assert "also waited for: rank 1" in text.splitlines()[0]


def test_of_a_send_the_one_that_has_not_come_is_named() -> None:
    waits = record(1, ("pp", (0, 1), "send", 9, 2.0), ("pp", (1, 0), "send", 4, 2.5))
    hangs = record(0, ("pp", (0, 1), "send", 8, 2.2), ("pp", (1, 0), "send", 4, 2.1))
    text = explain([waits, hangs], 2).splitlines()
    assert text[0] == "rank 0 has not come to send number 9 of group pp (rank 0 to rank 1), where others wait"
    assert text[2].endswith("its last collective is send number 9 of group pp (rank 0 to rank 1), 2 s ago")


def test_where_all_have_come_to_all_calls_nobody_is_late() -> None:
    records = [record(0, ("pp", (0, 1), "send", 9, 2.0)), record(1, ("pp", (0, 1), "send", 9, 2.0))]
    assert late_ranks(records) == {}
    assert explain(records, 2).startswith("all ranks have come to all collectives, and none ends\n")


def test_a_rank_without_any_call_in_a_group_is_late_in_it() -> None:
    records = [record(0, ("world", PAIR, "all_reduce", 1, 2.0)), record(1)]
    assert late_ranks(records)[1][:4] == ("world", PAIR, "all_reduce", 1)


def dog(rank: int, folder: Path, timeout: float, ends: list[tuple[str, int]], world: int = 2) -> Watchdog:
    group = Group("world", tuple(range(world)), rank)
    group.traffic.add(group.name, "all_reduce", 8, group.ranks)
    clock = Clock(torch.device("cpu"))
    clock.step = 3
    return Watchdog(group, clock, folder, timeout, lambda text, status: ends.append((text, status)))


def go_on(watched: Watchdog, seconds: float) -> None:
    for _ in range(int(seconds / 0.02)):
        watched.clock.alive()
        time.sleep(0.02)


def test_ranks_that_stand_still_end_their_run_and_say_where_they_are(tmp_path: Path) -> None:
    """Two ranks in one process: rank 0 waits in a collective that rank 1, which goes on for a while, does not
    come to.
    """
    ends: dict[int, list[tuple[str, int]]] = {0: [], 1: []}
    with (
        dog(0, tmp_path / "stalls", 2.0, ends[0]) as waits,
        dog(1, tmp_path / "stalls", 2.0, ends[1]) as moving,
    ):
        ep = Group("ep", (0, 1), 0, None, waits.world.traffic)
        waits.world.traffic.add(ep.name, "all_to_all", 8, ep.ranks)
        go_on(moving, 4.0)
        assert ends == {0: [], 1: []}  # a slow rank is waited for
        assert Record.read(tmp_path / "stalls/rank-00001.json").still < 1.0
        deadline = time.monotonic() + 20
        while not ends[0] and time.monotonic() < deadline:
            time.sleep(0.01)
    text, status = ends[0][0]
    assert status == STALLED
    assert text.startswith("error: no progress for ")
    assert (
        " s (parallel.timeout=2): rank 1 has not come to all_to_all number 1 of group ep (ranks 0, 1)"
        in text.splitlines()[0]
    )
    assert "rank 0 on" in text
    assert "test_ranks_that_stand_still" in text  # where the main thread was
    assert (tmp_path / "stalls/report-of-rank-00000.txt").read_text() == text.removeprefix("error: ")
    assert "Thread" in (tmp_path / "stalls/rank-00001.stacks.txt").read_text()


def test_a_rank_that_stopped_while_it_went_on_is_not_waited_for(tmp_path: Path) -> None:
    ends: list[tuple[str, int]] = []
    with dog(0, tmp_path, 1.0, ends):
        stopped = Record(1, 5, "host", 7, "save", 0.1, (), "")
        (tmp_path / "rank-00001.json").write_text(json.dumps(asdict(stopped)))
        deadline = time.monotonic() + 20
        while not ends and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "rank 1 has not come to all_reduce number 1 of group world" in ends[0][0]


def test_who_goes_on_is_left_alone_and_takes_its_record_back(tmp_path: Path) -> None:
    ends: list[tuple[str, int]] = []
    folder = tmp_path / "stalls"
    with dog(0, folder, 1.5, ends) as watched:
        go_on(watched, 2.0)
        assert not folder.exists()
        deadline = time.monotonic() + 20
        while not (folder / "rank-00000.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert Record.read(folder / "rank-00000.json").step == 3
        go_on(watched, 0.5)
        assert not list(folder.glob("still-*")) + list(folder.glob("*.json"))
    assert ends == []


def test_one_rank_alone_is_not_watched(tmp_path: Path) -> None:
    before = threading.active_count()
    with dog(0, tmp_path, 0.1, [], world=1):
        assert threading.active_count() == before


def test_a_folder_that_cannot_be_written_does_not_keep_it_from_ending(tmp_path: Path) -> None:
    ends: list[tuple[str, int]] = []
    (tmp_path / "file").write_text("")
    with dog(0, tmp_path / "file" / "stalls", 1.0, ends):
        deadline = time.monotonic() + 20
        while not ends and time.monotonic() < deadline:
            time.sleep(0.01)
    ((text, status),) = ends
    assert status == STALLED
    assert "cannot be used (Not a directory), so this is rank 0 alone:" in text
    assert "its last collective is all_reduce number 1 of group world" in text


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = record(1, ("ep", PAIR, "all_to_all", 57, 4.0), ("world", FOUR, "barrier", 1, 9.0))
    (tmp_path / "r.json").write_text(json.dumps(asdict(written)))
    assert Record.read(tmp_path / "r.json") == written
