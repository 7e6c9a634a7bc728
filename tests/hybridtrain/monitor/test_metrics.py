"""What a line of metrics costs in TensorBoard."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hybridtrain.monitor.metrics import MetricsLog, read_metrics


def test_a_list_is_one_entry_of_the_board_and_whole_in_the_file(tmp_path: Path) -> None:
    log, load = MetricsLog(tmp_path, 0, 0, 2), [0.5, 0.25, 0.125, 0.125]
    log.write(1, {"loss": 2.0, "layers.1/expert_load": load, "slowest/rank": 3})
    log.close()
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 2.0, "layers.1/expert_load": load, "slowest/rank": 3}
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = board.Tags()
    assert sorted(tags["scalars"]) == ["loss", "slowest/rank"]
    assert tags["histograms"] == ["layers.1/expert_load"]
    (event,) = board.Histograms("layers.1/expert_load")
    assert event.step == 1
    bars = event.histogram_value
    assert list(bars.bucket) == load
    assert list(bars.bucket_limit) == [1.0, 2.0, 3.0, 4.0]
    assert bars.sum == pytest.approx(0.25 + 2 * 0.125 + 3 * 0.125)


def test_two_starts_within_a_second_are_one_curve(tmp_path: Path) -> None:
    time.sleep(1 - time.time() % 1)
    for first in (1, 3):
        log = MetricsLog(tmp_path, 0, first - 1, 4)
        for step in range(first, 5):
            log.write(step, {"loss": float(first)})
        log.close()
        if first == 1:  # as a process whose number sorts, as text, behind that of the second start
            (written,) = (tmp_path / "tensorboard").iterdir()
            written.rename(written.with_name(f"{'.'.join(written.name.split('.')[:4])}.~"))
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 1), (2, 1), (3, 3), (4, 3)]


def test_a_clock_that_was_set_back_holds_no_start_for_long(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / f"tensorboard/events.out.tfevents.{int(time.time()) + 3600}.host.1.0").touch()
    begin_at = time.monotonic()
    MetricsLog(tmp_path, 0, 0, 4).close()
    assert time.monotonic() - begin_at < 30
