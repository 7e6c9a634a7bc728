from __future__ import annotations

import itertools
import threading
import time

import pytest

from hybridtrain.data.prefetch import Prefetcher, StepPrefetcher


def wait_until(condition) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_results_come_in_order_and_stay_within_depth() -> None:
    loaded: list[int] = []

    def load(step: int) -> int:
        loaded.append(step)
        return step * step

    with Prefetcher(load, first_step=5, depth=2) as ahead:
        wait_until(lambda: len(loaded) == 3)  # two waiting in the queue, one in hand
        time.sleep(0.05)
        assert loaded == [5, 6, 7]
        assert [ahead.get(step) for step in range(5, 30)] == [step * step for step in range(5, 30)]
        with pytest.raises(ValueError, match="step 40 is not the next one to hand over"):
            ahead.get(40)
        assert ahead.get(30) == 900
    assert ahead.close()
    with pytest.raises(RuntimeError, match="the prefetcher is closed"):
        ahead.get(31)


def test_an_exception_reaches_the_step_it_belongs_to() -> None:
    def load(step: int) -> int:
        if step == 2:
            raise KeyError("no step 2")
        return step

    ahead = Prefetcher(load, first_step=0)
    assert [ahead.get(0), ahead.get(1)] == [0, 1]
    with pytest.raises(KeyError, match="no step 2"):
        ahead.get(2)
    with pytest.raises(RuntimeError, match="the prefetcher is closed"):
        ahead.get(2)
    assert ahead.close()


def test_nothing_is_loaded_beyond_the_stop() -> None:
    loaded: list[int] = []
    with Prefetcher(loaded.append, first_step=0, depth=10, stop_step=3) as ahead:
        for step in range(3):
            ahead.get(step)
        with pytest.raises(ValueError, match="stop 3"):
            ahead.get(3)
    assert loaded == [0, 1, 2]


def test_closing_is_bounded_even_while_a_load_hangs() -> None:
    hang = threading.Event()
    ahead = Prefetcher(lambda step: hang.wait(30), first_step=0)
    began = time.monotonic()
    assert not ahead.close(timeout=0.2)
    assert time.monotonic() - began < 5
    hang.set()
    assert ahead.close()


def test_depth_is_checked() -> None:
    with pytest.raises(ValueError, match="depth=0 must be at least 1"):
        Prefetcher(lambda step: step, first_step=0, depth=0)


def test_finish_ends_two_processes_at_the_same_step_however_far_each_has_loaded() -> None:
    loaded: dict[str, list[int]] = {"ahead": [], "behind": []}
    go = threading.Event()

    def load(name: str, step: int) -> int:
        if name == "behind" and step > 0:
            assert go.wait(10)
        loaded[name].append(step)
        return step

    sources = {
        name: Prefetcher(lambda step, name=name: load(name, step), 0, depth=2, stop_step=50)
        for name in loaded
    }
    for source in sources.values():
        assert source.get(0) == 0
    deadline = time.monotonic() + 10
    while len(loaded["ahead"]) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loaded == {"ahead": [0, 1, 2, 3], "behind": [0]}
    go.set()
    for source in sources.values():
        source.finish()
    assert loaded["ahead"] == loaded["behind"] == [0, 1, 2, 3]


def test_a_feed_goes_on_elsewhere_and_ends_where_the_run_does() -> None:
    loaded: list[int] = []

    def load(number: int) -> int:
        loaded.append(number)
        return number

    with StepPrefetcher(load, steps=6) as feed:
        assert [feed.begin(0, 0), feed.get(1), feed.get(2), feed.get(3)] == [0, 1, 2, 3]
        assert [feed.begin(2, 2), feed.get(3), feed.get(4), feed.get(5)] == [
            4,
            5,
            6,
            7,
        ]  # back by two steps, and on in the data
        with pytest.raises(ValueError, match="not the next one"):
            feed.get(6)
        feed.finish()
    assert max(loaded) == 7


def test_a_feed_that_goes_on_elsewhere_waits_for_the_load_under_way_however_long_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loads are collective: two threads at once would answer each other's calls."""
    under_way, most, slow, go = 0, 0, threading.Event(), threading.Event()

    def load(number: int) -> int:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        if number == 1:
            slow.set()
            assert go.wait(10)
        under_way -= 1
        return number

    with StepPrefetcher(load, steps=6) as feed:
        assert feed.begin(0, 0) == 0
        assert slow.wait(10)
        hours = itertools.count(0.0, 3600.0)
        monkeypatch.setattr(
            time, "monotonic", lambda: next(hours)
        )  # nobody's patience lasts longer than the load
        threading.Timer(0.3, go.set).start()
        assert feed.begin(2, 2) == 4
    assert most == 1
