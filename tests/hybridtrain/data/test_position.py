"""Which targets are read once the length, the batch or the layout changed: each of an epoch exactly once,
counted by its place.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridtrain.data.batches import IGNORED, Batch, BatchLoader, BatchShare
from hybridtrain.data.order import SampleOrder
from hybridtrain.data.position import Position, SampleStream
from hybridtrain.data.shards import Split

TOKENS = 730
BATCHES, LENGTHS = (6, 12), (16, 24, 40)
LAYOUTS = ((1, 1), (2, 1), (3, 2))  # data-parallel ranks, micro-batches
GRID = list(itertools.product(BATCHES, LENGTHS, LAYOUTS))
Setting = tuple[int, int, tuple[int, int]]


class Places(Split):
    """A split whose tokens are their own places, so that batches say what was read."""

    def __init__(self, num_tokens: int) -> None:
        self.name, self.num_tokens, self.separator_id = "train", num_tokens, 0

    def window(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        assert 0 <= start < start + length <= self.num_tokens
        return np.arange(start, start + length), np.zeros(length, np.bool_)


def loaders(
    batch: int, length: int, layout: tuple[int, int], begin: Position | None, step: int
) -> list[BatchLoader]:
    ranks, micro_batches = layout
    return [
        BatchLoader(Places(TOKENS), length, BatchShare(batch, micro_batches, rank, ranks), 3, begin, step)
        for rank in range(ranks)
    ]


def read(parts: list[BatchLoader], step: int) -> list[Batch]:
    """The sequences of a step's global batch in their order, out of all ranks' parts."""
    batches = [part.load(step) for part in parts]
    whole = (
        torch.cat([getattr(b, name) for b in batches], 1).flatten(0, 1)
        for name in ("tokens", "targets", "starts")
    )
    return [Batch(*one) for one in zip(*whole, strict=True)]


def targets_of(sequences: list[Batch]) -> list[int]:
    return [t for one in sequences for t in one.targets[one.targets != IGNORED].tolist()]


@pytest.mark.parametrize("before", GRID)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_resume_at_any_batch_length_and_layout_reads_each_target_of_an_epoch_once(
    before: Setting, length: int
) -> None:
    for batch, layout in itertools.product(BATCHES, LAYOUTS):
        read_an_epoch(before, (batch, length, layout))


def read_an_epoch(before: Setting, after: Setting) -> None:
    """One step, a resume, and on until the epoch is over."""
    first, window = loaders(*before, None, 0), before[1]
    seen = [targets_of(read(first, 0))]
    second = loaders(*after, first[0].position(1), 1)
    assert second[0].position(1) == first[0].position(1)
    step, epoch = 1, first[0].stream.num_windows * window
    while sum(map(len, seen)) < epoch:
        seen.append(targets_of(read(second, step)))
        assert len(seen[-1]) == second[0].targets(step)
        step += 1
    flat = list(itertools.chain(*seen))
    assert sorted(flat[:epoch]) == list(range(1, epoch + 1))
    assert len(set(flat[epoch:])) == len(flat[epoch:])  # the next epoch
    assert seen[0] == targets_of(read(loaders(before[0], window, (1, 1), None, 0), 0))
    assert seen[1] == targets_of(read(loaders(*after[:2], (1, 1), first[0].position(1), 1), 1))


@settings(max_examples=60)
@given(
    num_targets=st.integers(200, 400),
    changes=st.lists(st.tuples(st.integers(1, 70), st.integers(0, 12)), min_size=2, max_size=6),
    seed=st.integers(0, 2**32),
)
def test_any_chain_of_lengths_reads_each_target_of_each_epoch_once(
    num_targets: int, changes: list[tuple[int, int]], seed: int
) -> None:
    at, seen = Position(0, changes[0][0]), []
    for length, samples in [*changes, (31, 60)]:
        stream = SampleStream(seed, num_targets, length, at)
        targets = [(low + 1, count) for ranges in stream.ranges(np.arange(samples)) for low, count in ranges]
        assert sum(count for _, count in targets) == stream.targets(0, samples)
        places = [(stream.after(n), stream.after(n + 1)) for n in range(samples)]
        assert all(b.epoch == a.epoch or (b.epoch, b.read) == (a.epoch + 1, 0) for a, b in places)
        for ranges, (place, _) in zip(stream.ranges(np.arange(samples)), places, strict=True):
            seen += [(place.epoch, t) for low, count in ranges for t in range(low + 1, low + 1 + count)]
        at = stream.after(samples)
    assert len(seen) == len(set(seen))
    for epoch in range(at.epoch):
        read_of_it = sorted(t for e, t in seen if e == epoch)
        assert read_of_it == list(range(1, len(read_of_it) + 1))
        assert num_targets - len(read_of_it) < 70  # the end of the split that is shorter than a window


def test_without_a_change_of_length_the_samples_are_those_of_the_order() -> None:
    """Also where the batch changed, and where a length was changed back between two windows."""
    order = SampleOrder(3, 729 // 16)
    wanted = [[(int(w) * 16, 16)] for w in order.sample(np.arange(300))]
    assert SampleStream(3, 729, 16, Position(0, 16)).ranges(np.arange(300)) == wanted
    for read_before in (1, 7, 44, 45, 46, 100):
        begin = SampleStream(3, 729, 16, Position(0, 16)).after(read_before)
        assert SampleStream(3, 729, 16, begin).ranges(np.arange(300 - read_before)) == wanted[read_before:]
    begin = SampleStream(3, 729, 8, SampleStream(3, 729, 16, Position(0, 16)).after(5)).after(6)
    assert SampleStream(3, 729, 16, begin).ranges(np.arange(60)) == wanted[8:68]


def test_documents_do_not_reach_over_the_border_of_two_windows() -> None:
    (loader,) = loaders(6, 16, (1, 1), None, 0)
    (longer,) = loaders(6, 40, (1, 1), loader.position(1), 1)
    order = SampleOrder(3, loader.num_windows).sample(np.arange(6, 9)) * 16
    sequence = read([longer], 1)[0]
    assert sequence.tokens.tolist() == [
        *range(order[0], order[0] + 16),
        *range(order[1], order[1] + 16),
        *range(order[2], order[2] + 8),
    ]
    assert sequence.starts.nonzero().flatten().tolist() == [16, 32]
    assert torch.equal(sequence.targets, sequence.tokens + 1)


def test_the_last_piece_of_an_epoch_is_padded() -> None:
    (loader,) = loaders(6, 16, (1, 1), None, 0)
    left = (loader.num_windows - 6) * 16
    (longer,) = loaders(6, 40, (1, 1), loader.position(1), 1)
    number = left // 40
    last = read([longer], 1 + number // 6)[number % 6]
    assert left % 40 == (last.targets != IGNORED).sum() == 24
    assert last.starts[left % 40 :].all()
    assert longer.targets(1 + number // 6) == 6 * 40 - (40 - left % 40)


def test_a_place_that_a_split_has_not_is_refused() -> None:
    for place in (Position(0, 800, 5), Position(0, 16, 720), Position(0, 0, 0), Position(-1, 16, 0)):
        with pytest.raises(ValueError, match="a split of 729 targets has no Position"):
            SampleStream(0, 729, 16, place)
