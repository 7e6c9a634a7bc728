"""Who is slow: waiting for others is no slowness, and the one they wait for is named."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybridtrain.monitor.clock import Clock
from hybridtrain.monitor.metrics import read_metrics
from hybridtrain.monitor.stragglers import slowest
from hybridtrain.settings.tree import Settings
from tests.ranks import run_on_ranks
from tests.training import TINY, ci_settings, train_here


@pytest.mark.parametrize(
    ("own", "stages", "expected"),
    [
        ([1.0, 3.0], [0, 0], (1, 3.0)),
        ([1.0, 1.1, 1.2, 2.2], [0, 0, 0, 0], (3, 2.0)),
        ([1.0, 1.2, 5.0, 5.5], [0, 0, 1, 1], (1, 1.2)),  # a stage with more to do is not slow
        ([0.0, 0.0], [0, 1], (0, 1.0)),
    ],
)
def test_the_slowest_rank_is_measured_by_its_stage(
    own: list[float], stages: list[int], expected: tuple[int, float]
) -> None:
    rank, ratio = slowest(own, stages)
    assert (rank, round(ratio, 6)) == expected


def train_slowly(settings: Settings) -> None:
    """On a rank: rank 1 takes half a second longer for each forward pass, and the other waits for it within
    its own.
    """
    import os

    real = Clock.phase

    @contextlib.contextmanager
    def phase(clock: Clock, name: str) -> Iterator[None]:
        with real(clock, name):
            if name == "forward" and os.environ["RANK"] == "1":
                time.sleep(0.5)
            yield

    Clock.phase = phase  # type: ignore[method-assign]
    train_here(settings, False)


@pytest.mark.parametrize("fetch", ["step", "overlap"])
def test_a_slow_rank_is_named_though_all_ranks_take_as_long(
    ci_data: Path, tmp_path: Path, fetch: str
) -> None:
    overrides = [
        "train.steps=4",
        "train.log_every=2",
        "train.eval_every=0",
        "parallel.ep=2",
        f"engram.fetch={fetch}",
    ]
    run_on_ranks(train_slowly, 2, ci_settings(tmp_path / "run", ci_data, *TINY, *overrides))
    lines = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert [line["slowest/rank"] for line in lines] == [1, 1]
    last = lines[-1]
    assert last["slowest/seconds_per_step"] > 0.5
    assert last["slowest/over_median"] > 2.0
    assert last["seconds_per_step"] > 0.5  # of rank 0, which waited
