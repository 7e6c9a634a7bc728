"""Whether a step's update is made: judged by its loss before the update, alike on every rank."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

from hybridtrain.settings.tree import TrainSettings

_MAD_TO_DEVIATION = 1.4826  # of a normal distribution
_LEAST_DEVIATION = 1e-3  # of the median: a loss that hardly moves has no spikes below this


def all_finite(loss: float, grad_norm: float) -> bool:
    return math.isfinite(loss) and math.isfinite(grad_norm)


class SpikeGuard:
    """Refuses steps whose loss or gradient norm is not finite, and losses that stand out of the last
    `train.spike_window`.

    `skipped_batches` counts the steps' worth of data that rollbacks left out: step k of the run (from 0)
    trains on the data of step k + skipped_batches. Losses and norms are the same on all ranks, so the
    judgements are. `state` is kept in checkpoints, so that a resumed run judges as one that was not
    interrupted.
    """

    def __init__(self, train: TrainSettings) -> None:
        self._train = train
        self._losses: deque[float] = deque(maxlen=train.spike_window)
        self._refused_at = 0
        self.skipped_batches = 0
        self.refusals = 0  # since the run last got past the step that was refused

    def score(self, loss: float) -> float | None:
        """How many robust deviations `loss` is above the median of the window; None before the window is
        full.
        """
        if len(self._losses) < self._train.spike_window:
            return None
        middle = median(self._losses)
        spread = _MAD_TO_DEVIATION * median(abs(value - middle) for value in self._losses)
        return (loss - middle) / max(spread, _LEAST_DEVIATION * abs(middle))

    def accepts(self, loss: float, grad_norm: float) -> bool:
        score = self.score(loss) if self._train.spike_score else None
        return all_finite(loss, grad_norm) and (score is None or score <= self._train.spike_score)

    def took(self, step: int, loss: float) -> None:
        """Note that the update of step `step` (from 1) was made."""
        self._losses.append(loss)
        if step > self._refused_at:
            self.refusals = 0

    def refuse(self, step: int) -> bool:
        """Note that the update of step `step` (from 1) was not made; True where `train.spike_limit` allows to
        go on.
        """
        self._refused_at = max(step, self._refused_at)
        self.refusals += 1
        return self.refusals <= self._train.spike_limit

    def describe(self, loss: float, grad_norm: float) -> str:
        """Why a step was refused."""
        score = self.score(loss) if all_finite(loss, grad_norm) else None
        if score is None:
            return f"the loss is {loss} and the gradient norm {grad_norm}"
        return (
            f"the loss {loss:.4f} is {score:.1f} robust deviations above {median(self._losses):.4f}, the "
            f"median of the last {len(self._losses)} (train.spike_score={self._train.spike_score:g})"
        )

    def state(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "skipped_batches": self.skipped_batches}

    def load_state(self, state: dict[str, Any]) -> None:
        self._losses = deque(state["losses"], maxlen=self._train.spike_window)
        self.skipped_batches = state["skipped_batches"]
