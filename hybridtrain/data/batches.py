"""Batches for training and validation: which rank sees which windows, independent of the layout.

Legend: M micro-batches, B sequences of a micro-batch on this rank, T tokens of a sequence. Window w of a
split is its tokens w*T .. w*T+T: T inputs, and the same shifted by one as targets, so neighbouring windows
share one token. A sequence is a window, or after a change of T several ranges of the split (position.py), and
then each begins a document of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hybridtrain.data.position import Position, Range, SampleStream
from hybridtrain.data.shards import Split
from hybridtrain.errors import DataError

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    `tokens` int64 [M, B, T]; `targets` int64 [M, B, T], the next token or -100 (ignored); `starts` bool [M,
    B, T], True where a document starts (the token is the separator) or another range of the split does, so
    that `starts.cumsum(-1)` numbers the documents of a sequence.
    """

    tokens: Tensor
    targets: Tensor
    starts: Tensor

    def at(self, positions: Tensor | None) -> Batch:
        """Only the tokens and targets at these places of each sequence; `starts` stays whole. None: all."""
        if positions is None:
            return self
        return Batch(
            self.tokens.index_select(2, positions), self.targets.index_select(2, positions), self.starts
        )

    def to(self, device: torch.device) -> Batch:
        return Batch(self.tokens.to(device), self.targets.to(device), self.starts.to(device))


@dataclass(frozen=True)
class BatchShare:
    """The part of each global batch that data-parallel rank `rank` of `ranks` reads.

    Micro-batch m is the m-th block of G/M samples of the global batch (G = `global_batch`), and rank r reads
    the r-th part of each block: the ranks' parts in order give the same global micro-batches at every number
    of ranks. Raises DataError where G does not divide.
    """

    global_batch: int
    micro_batches: int = 1
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        parts = self.micro_batches * self.ranks
        if self.global_batch < 1 or self.global_batch % parts:
            nearest = parts * max(1, round(self.global_batch / parts))
            raise DataError(
                f"a global batch of {self.global_batch} sequences does not divide into {self.micro_batches} "
                f"micro-batches on {self.ranks} data-parallel ranks; {nearest} does"
            )

    def offsets(self) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """The rank's sample numbers inside a global batch, int64 [M, B]."""
        offsets = np.arange(self.global_batch, dtype=np.int64)
        return offsets.reshape(self.micro_batches, self.ranks, -1)[:, self.rank]


class BatchLoader:
    """Training batches as a function of the step alone.

    Step k takes the samples (k-b)*G .. (k-b)*G+G-1 from the position `begin` on, which is where step b =
    `first_step` begins (G = `share.global_batch`); without it the data begin at step 0. Raises DataError
    where the split has less than one window.
    """

    def __init__(
        self,
        split: Split,
        seq_len: int,
        share: BatchShare,
        seed: int,
        begin: Position | None = None,
        first_step: int = 0,
    ) -> None:
        self._split, self._seq_len = split, seq_len
        self._global_batch, self._first_step = share.global_batch, first_step
        self._offsets_MB = share.offsets()
        if split.num_tokens - 1 < seq_len:
            raise DataError(
                f"the {split.name} split has {split.num_tokens} tokens, fewer than one window of "
                f"seq_len={seq_len} and its last target; set train.seq_len to at most "
                f"{max(split.num_tokens - 1, 0)} or prepare more text"
            )
        self.stream = SampleStream(seed, split.num_tokens - 1, seq_len, begin or Position(0, seq_len))
        self.num_windows = self.stream.num_windows

    def load(self, step: int) -> Batch:
        """This rank's part of the batch of step `step` (from 0)."""
        numbers_MB = self.samples_before(step) + self._offsets_MB
        return _gather(
            self._split, self.stream.ranges(numbers_MB.reshape(-1)), numbers_MB.shape, self._seq_len
        )

    def samples_before(self, step: int) -> int:
        """How many samples of the stream lie before those of step `step`."""
        return (step - self._first_step) * self._global_batch

    def targets(self, step: int) -> int:
        """How many targets the global batch of a step has."""
        return self.stream.targets(self.samples_before(step), self._global_batch)

    def position(self, step: int) -> Position:
        """Where in the data step `step` begins."""
        return self.stream.after(self.samples_before(step))


class EvalBatches:
    """Consecutive windows that hold every target of the split exactly once; iterating again starts over.

    The last window is padded (tokens: separator, targets: ignored) and the last batch is filled with ignored
    windows, so every rank has the same number of batches. `limit` above 0 stops after that many batches.
    Raises DataError where the split has no target.
    """

    def __init__(self, split: Split, seq_len: int, share: BatchShare, limit: int = 0) -> None:
        self._split, self._seq_len, self._global_batch = split, seq_len, share.global_batch
        self._offsets_MB = share.offsets()
        if split.num_tokens < 2:
            raise DataError(
                f"the {split.name} split has {split.num_tokens} tokens and nothing to predict; prepare the "
                "data with a validation fraction above 0 or a validation text (--validation FILE)"
            )
        whole = math.ceil(math.ceil((split.num_tokens - 1) / seq_len) / share.global_batch)
        self._num_batches = min(whole, limit) if limit else whole

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self._num_batches):
            lows_MB = (number * self._global_batch + self._offsets_MB) * self._seq_len
            ranges = [[(low, self._length(low))] for low in lows_MB.reshape(-1).tolist()]
            yield _gather(self._split, ranges, lows_MB.shape, self._seq_len)

    def _length(self, low: int) -> int:
        return max(0, min(self._seq_len, self._split.num_tokens - 1 - low))


def _gather(split: Split, ranges: list[list[Range]], shape_MB: tuple[int, ...], seq_len: int) -> Batch:
    """The sequences that these ranges make, the sequences in row-major order; what they leave of `seq_len` is
    padding.
    """
    shape = (*shape_MB, seq_len)
    tokens_MBT = np.full(shape, split.separator_id, np.int64)
    targets_MBT = np.full(shape, IGNORED, np.int64)
    starts_MBT = np.ones(shape, np.bool_)
    for place, parts in zip(np.ndindex(shape_MB), ranges, strict=True):
        at = 0
        for low, length in parts:
            if length > 0:
                tokens, starts = split.window(low, length + 1)
                here = slice(at, at + length)
                tokens_MBT[place][here], targets_MBT[place][here] = tokens[:-1], tokens[1:]
                starts_MBT[place][here] = starts[:-1]
                starts_MBT[place][at] |= at > 0
                at += length
    return Batch(torch.from_numpy(tokens_MBT), torch.from_numpy(targets_MBT), torch.from_numpy(starts_MBT))
