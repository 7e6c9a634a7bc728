"""Where a run stands in the data, and which tokens its samples are from there on, whatever their length was
before.

An epoch is a sequence of windows: window w of length L is the targets w*L+1 .. w*L+L of the split, and
`SampleOrder` says in which order they come. A run whose length changes within an epoch reads what is left of
that epoch in its old order, cut anew; later epochs have windows of the new length. So each target of an epoch
is read exactly once at any lengths (docs/adr/0013).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybridtrain.data.order import SampleOrder

_MOST_SAMPLES = 1 << 62  # what 64 bits number, and room to go on

Range = tuple[int, int]
"""First token in the split, and number of tokens; the targets are the same shifted by one."""


@dataclass(frozen=True)
class Position:
    """`read` tokens of epoch `epoch` were read, whose windows have `window` tokens."""

    epoch: int
    window: int
    read: int = 0

    def fits(self, num_targets: int) -> bool:
        """Whether a split of so many targets has such a position."""
        whole = num_targets // self.window * self.window if self.window > 0 else 0
        there = self.read == 0 or 0 < self.read < whole
        return self.window > 0 and there and 0 <= self.epoch < _MOST_SAMPLES // max(1, num_targets)


class SampleStream:
    """The samples of `seq_len` tokens that follow the position `begin`, numbered from 0; any of them in
    constant memory.

    The first `pieces` samples are the rest of an epoch in windows of another length: each is one or several
    ranges of the split, the last one may be shorter than the others. The rest are whole windows. Raises
    ValueError where the split has less than one window, or no such position.
    """

    def __init__(self, seed: int, num_targets: int, seq_len: int, begin: Position) -> None:
        if not begin.fits(num_targets):
            raise ValueError(f"a split of {num_targets} targets has no {begin}")
        self.seq_len, self.begin = seq_len, begin
        self.num_windows = num_targets // seq_len
        self._order = SampleOrder(seed, self.num_windows)
        self._old: SampleOrder | None = None
        self._rest = self.pieces = 0
        if begin.read == 0 or (begin.window == seq_len and begin.read % seq_len == 0):
            self._first = begin.epoch * self.num_windows + begin.read // seq_len
        else:
            self._old = SampleOrder(seed, num_targets // begin.window)
            self._rest = self._old.num_samples * begin.window - begin.read
            self.pieces = -(-self._rest // seq_len)
            self._first = (begin.epoch + 1) * self.num_windows

    def ranges(self, numbers: npt.NDArray[np.int64]) -> list[list[Range]]:
        """The ranges of each sample of `numbers`, int64 [n], all at least 0."""
        lows = self._order.sample(self._first + np.maximum(numbers - self.pieces, 0)) * self.seq_len
        return [
            self._joined(number) if number < self.pieces else [(low, self.seq_len)]
            for number, low in zip(numbers.tolist(), lows.tolist(), strict=True)
        ]

    def targets(self, first: int, count: int) -> int:
        """How many targets `count` samples from number `first` on have."""
        lacking = self.pieces * self.seq_len - self._rest if first < self.pieces <= first + count else 0
        return count * self.seq_len - lacking

    def after(self, count: int) -> Position:
        """The position once so many samples were read."""
        if count < self.pieces:
            return Position(self.begin.epoch, self.begin.window, self.begin.read + count * self.seq_len)
        epoch, place = divmod(self._first + count - self.pieces, self.num_windows)
        return Position(epoch, self.seq_len, place * self.seq_len)

    def _joined(self, number: int) -> list[Range]:
        assert self._old is not None
        window = self.begin.window
        low = self.begin.read + number * self.seq_len
        high = min(low + self.seq_len, self.begin.read + self._rest)
        places = np.arange(low // window, (high - 1) // window + 1)
        windows = self._old.sample(self.begin.epoch * self._old.num_samples + places)
        out = []
        for place, start in zip(places.tolist(), (windows * window).tolist(), strict=True):
            skipped = max(0, low - place * window)
            out.append((start + skipped, min(window, high - place * window) - skipped))
        return out
