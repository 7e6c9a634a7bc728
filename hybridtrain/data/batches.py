"""Batches for training and validation: which rank sees which windows, independent of the layout.

Legend: M micro-batches, B sequences of a micro-batch on this rank, T tokens of a sequence. Window w of a split is its tokens
w*T .. w*T+T: T inputs, and the same shifted by one as targets, so neighbouring windows share one token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hybridtrain.data.order import SampleOrder
from hybridtrain.data.shards import Split
from hybridtrain.errors import DataError

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch.

    `tokens` int64 [M, B, T]; `targets` int64 [M, B, T], the next token or -100 (ignored); `starts` bool [M, B, T], True
    where a document starts (the token is the separator), so that `starts.cumsum(-1)` numbers the documents of a sequence.
    """

    tokens: Tensor
    targets: Tensor
    starts: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.tokens.to(device), self.targets.to(device), self.starts.to(device))


class BatchLoader:
    """Training batches as a function of the step alone.

    Step k takes the samples k*G .. k*G+G-1 of the sample order (G = `global_batch`). Micro-batch m is their m-th block of
    G/M, and data-parallel rank r has the r-th part of each block: the ranks' parts in order give the same global
    micro-batches at every `dp_size`. Raises DataError where the split has not one window, or G does not divide.
    """

    def __init__(
        self, split: Split, seq_len: int, global_batch: int, micro_batches: int, dp_rank: int, dp_size: int, seed: int
    ) -> None:
        self._split, self._seq_len = split, seq_len
        self._global_batch = global_batch
        self._offsets_MB = _offsets(global_batch, micro_batches, dp_rank, dp_size)
        self.num_windows = (split.num_tokens - 1) // seq_len
        if self.num_windows < 1:
            raise DataError(
                f"the {split.name} split has {split.num_tokens} tokens, fewer than one window of seq_len={seq_len} and its "
                f"last target; set train.seq_len to at most {max(split.num_tokens - 1, 0)} or prepare more text"
            )
        self._order = SampleOrder(seed, self.num_windows)

    def load(self, step: int) -> Batch:
        """This rank's part of the batch of step `step` (from 0)."""
        windows_MB = self._order.sample(step * self._global_batch + self._offsets_MB)
        return _gather(self._split, windows_MB, self._seq_len)


class EvalBatches:
    """Consecutive windows that hold every target of the split exactly once; iterating again starts over.

    `batch` is the number of sequences of a global batch, cut into micro-batches and ranks as BatchLoader does. The last
    window is padded (tokens: separator, targets: ignored) and the last batch is filled with ignored windows, so every rank
    has the same number of batches. `limit` above 0 stops after that many batches. Raises DataError where the split has no
    target, or `batch` does not divide.
    """

    def __init__(
        self, split: Split, seq_len: int, batch: int, dp_rank: int, dp_size: int, micro_batches: int = 1, limit: int = 0
    ) -> None:
        self._split, self._seq_len, self._batch = split, seq_len, batch
        self._offsets_MB = _offsets(batch, micro_batches, dp_rank, dp_size)
        if split.num_tokens < 2:
            raise DataError(
                f"the {split.name} split has {split.num_tokens} tokens and nothing to predict; prepare the data with "
                "a validation fraction above 0 or a validation text (--validation FILE)"
            )
        whole = math.ceil(math.ceil((split.num_tokens - 1) / seq_len) / batch)
        self._num_batches = min(whole, limit) if limit else whole

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self._num_batches):
            yield _gather(self._split, number * self._batch + self._offsets_MB, self._seq_len)


def _offsets(global_batch: int, micro_batches: int, dp_rank: int, dp_size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Sample numbers inside a global batch, int64 [M, B], of one rank."""
    if global_batch < 1 or global_batch % (micro_batches * dp_size):
        nearest = micro_batches * dp_size * max(1, round(global_batch / (micro_batches * dp_size)))
        raise DataError(
            f"a global batch of {global_batch} sequences does not divide into {micro_batches} micro-batches "
            f"on {dp_size} data-parallel ranks; {nearest} does"
        )
    return np.arange(global_batch, dtype=np.int64).reshape(micro_batches, dp_size, -1)[:, dp_rank]


def _gather(split: Split, windows_MB: np.ndarray[tuple[int, ...], np.dtype[np.int64]], seq_len: int) -> Batch:
    """The windows of these numbers; what lies beyond the split is padding."""
    shape = (*windows_MB.shape, seq_len)
    tokens_MBT = np.full(shape, split.separator_id, np.int64)
    targets_MBT = np.full(shape, IGNORED, np.int64)
    starts_MBT = np.ones(shape, np.bool_)
    for place in np.ndindex(windows_MB.shape):
        low = int(windows_MB[place]) * seq_len
        length = min(seq_len, split.num_tokens - 1 - low)
        if length > 0:
            tokens, starts = split.window(low, length + 1)
            tokens_MBT[place][:length], targets_MBT[place][:length] = tokens[:-1], tokens[1:]
            starts_MBT[place][:length] = starts[:-1]
    return Batch(torch.from_numpy(tokens_MBT), torch.from_numpy(targets_MBT), torch.from_numpy(starts_MBT))
