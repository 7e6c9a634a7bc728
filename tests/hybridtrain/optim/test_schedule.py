from __future__ import annotations

import pytest

from hybridtrain.optim.schedule import lr_scale
from hybridtrain.settings.tree import OptimSettings


def scales(total, **settings):
    optim = OptimSettings(**settings)
    return [lr_scale(step, optim, total) for step in range(total)]


def test_warm_up_is_linear_from_the_first_step():
    assert scales(10, warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_without_warm_up_the_first_step_has_the_peak(schedule):
    assert scales(10, warmup_steps=0, schedule=schedule)[0] == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_warm_up_longer_than_the_run_is_cut_off(schedule):
    assert scales(3, warmup_steps=10, schedule=schedule) == pytest.approx([0.1, 0.2, 0.3])
    assert scales(3, warmup_steps=3, schedule=schedule)[-1] == 1.0


def test_cosine_halves_in_the_middle_and_ends_at_the_ratio():
    values = scales(102, warmup_steps=2, final_lr_ratio=0.2)
    assert values[52] == pytest.approx(0.6)
    assert values[27] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + 2**-0.5))
    assert 0.2 < values[-1] < 0.201
    assert lr_scale(102, OptimSettings(warmup_steps=2, final_lr_ratio=0.2), 102) == 0.2


def test_wsd_is_flat_then_linear():
    values = scales(100, schedule="wsd", warmup_steps=10, decay_fraction=0.2, final_lr_ratio=0.5)
    assert values[9:81] == [1.0] * 72
    assert values[80:] == pytest.approx([1 - 0.5 * i / 20 for i in range(20)])


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, [1.0] * 8), (1.0, [1.0 - i / 8 for i in range(8)])])
def test_wsd_without_decay_and_with_nothing_else(fraction, expected):
    values = scales(10, schedule="wsd", warmup_steps=2, decay_fraction=fraction, final_lr_ratio=0.0)
    assert values[2:] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 19, 20])
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_every_step_of_a_run_has_a_positive_scale_that_falls_after_the_warm_up(schedule, warmup, ratio):
    values = scales(20, schedule=schedule, warmup_steps=warmup, final_lr_ratio=ratio)
    assert all(0.0 < value <= 1.0 for value in values)
    after = values[max(warmup - 1, 0) :]
    assert after == sorted(after, reverse=True)
