from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridtrain.data.order import SampleOrder


@settings(max_examples=60, deadline=None)
@given(num_samples=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 10**6))
def test_every_epoch_visits_every_window_once(num_samples: int, seed: int, epoch: int) -> None:
    order = SampleOrder(seed, num_samples)
    windows = order.sample(np.arange(num_samples) + epoch * num_samples)
    assert windows.dtype == np.int64
    np.testing.assert_array_equal(np.sort(windows), np.arange(num_samples))


def test_epochs_and_seeds_differ() -> None:
    n = 1000
    runs = [
        SampleOrder(seed, n).sample(np.arange(n) + epoch * n) for seed in (0, 1, 2**40) for epoch in (0, 1, 2)
    ]
    for number, first in enumerate(runs):
        assert (first == np.arange(n)).mean() < 0.01
        assert all((first == second).mean() < 0.01 for second in runs[:number])


def test_grouping_and_shape_do_not_matter() -> None:
    order = SampleOrder(7, 97)
    together = order.sample(np.arange(300))
    np.testing.assert_array_equal(order.sample(np.arange(300).reshape(3, 4, 25)).reshape(-1), together)
    assert [int(order.sample(n)) for n in range(300)] == together.tolist()
    np.testing.assert_array_equal(SampleOrder(7, 97).sample(np.arange(299, -1, -1)), together[::-1])


def test_the_order_looks_random() -> None:
    n = 4096
    windows = np.concatenate([SampleOrder(seed, n).sample(np.arange(n)) for seed in range(10)]).reshape(10, n)
    steps = np.diff(windows, axis=1)
    assert abs(np.corrcoef(windows[:, :-1].ravel(), windows[:, 1:].ravel())[0, 1]) < 0.03
    assert (np.abs(steps) == 1).mean() < 0.002
    counts = np.histogram2d(np.tile(np.arange(n), 10), windows.ravel(), bins=16)[0]
    chi_square = ((counts - 160) ** 2 / 160).sum()
    assert 140 < chi_square < 320  # 225 expected, standard deviation about 21


def test_large_corpora_and_late_samples() -> None:
    order = SampleOrder(3, 10**13 + 7)
    windows = order.sample(np.array([0, 1, 10**13, 10**17]))
    assert ((windows >= 0) & (windows < 10**13 + 7)).all()
    assert len(set(windows.tolist())) == 4
    with pytest.raises(ValueError, match="num_samples=0 must be at least 1"):
        SampleOrder(0, 0)


def test_the_order_is_pinned() -> None:
    """Resumed runs rely on it: a change of these numbers is a change of format."""
    assert SampleOrder(0, 1000).sample(np.arange(6)).tolist() == [246, 679, 173, 534, 147, 195]
