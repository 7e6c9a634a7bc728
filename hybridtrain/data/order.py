"""The global sample order: a pure function of seed and sample number, in constant memory, the same at every
layout.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInts = npt.NDArray[np.uint64]

_ROUNDS = 6
_EPOCH_KEY, _ROUND_KEY = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03)


class SampleOrder:
    """Each epoch visits every one of `num_samples` windows once, in an order keyed by (seed, epoch).

    The order of an epoch is a Feistel network over the next power of four, walked along its cycles until it
    lands inside `num_samples` (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """

    def __init__(self, seed: int, num_samples: int) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be at least 1")
        self.num_samples = num_samples
        self._half_bits = np.uint64(max(1, ((num_samples - 1).bit_length() + 1) // 2))
        self._mask = (np.uint64(1) << self._half_bits) - np.uint64(1)
        self._seed = _mix(np.array([seed & (1 << 64) - 1], np.uint64))

    def sample(self, indices: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The window numbers (0 .. num_samples-1) of global sample numbers of any shape; sample n is of epoch
        n // num_samples.
        """
        numbers = np.asarray(indices, np.int64)
        flat = numbers.reshape(-1)
        epochs = (flat // self.num_samples).astype(np.uint64)
        keys = _mix(self._seed ^ _mix(epochs * _EPOCH_KEY))
        values = (flat % self.num_samples).astype(np.uint64)
        walking = np.arange(flat.size)
        while walking.size:
            values[walking] = self._permute(values[walking], keys[walking])
            walking = walking[values[walking] >= self.num_samples]
        return values.astype(np.int64).reshape(numbers.shape)

    def _permute(self, values: UInts, keys: UInts) -> UInts:
        """A keyed bijection of 0 .. 4**half_bits - 1."""
        left, right = values >> self._half_bits, values & self._mask
        for number in range(1, _ROUNDS + 1):
            key = keys + np.full(1, number, np.uint64) * _ROUND_KEY
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half_bits) | right


def _mix(values: UInts) -> UInts:
    """The finaliser of SplitMix64: a bijection of 64-bit words in which every input bit reaches every output
    bit.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
