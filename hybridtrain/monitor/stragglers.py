"""How long each rank takes for its own part of a step, without waiting for others: who is slow."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median_low

import torch

from hybridtrain.parallel.collectives import all_reduce_
from hybridtrain.parallel.mesh import Mesh


class StepTimes:
    """Adds up the seconds of steps, and those of them in which this rank did not wait for others.

    Work that the host does not wait for, as on CUDA, counts as its own: there all ranks look alike.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self.seconds = self._own = 0.0
        self.skip()

    def skip(self) -> None:
        """Leave the time since the last call of any method out of the steps."""
        self._mark, self._waited = time.perf_counter(), self._mesh.traffic.waited

    def add(self) -> None:
        """Add the time since the last call of any method to the steps."""
        before, waited = self._mark, self._waited
        self.skip()
        self.seconds += self._mark - before
        self._own += self._mark - before - (self._waited - waited)

    def take(self, steps: int) -> tuple[float, list[float]]:
        """This rank's seconds since the last call, and every rank's own seconds per step of the last `steps`;
        collective.
        """
        own = torch.zeros(self._mesh.world.size, dtype=torch.float64, device=self._mesh.device)
        own[self._mesh.rank] = self._own / steps
        seconds, self.seconds, self._own = self.seconds, 0.0, 0.0
        return seconds, all_reduce_(own, self._mesh.world).tolist()


def slowest(own: Sequence[float], stages: Sequence[int]) -> tuple[int, float]:
    """The rank that is slowest beside the median of its pipeline stage, and how many times that it takes.

    `own` are the ranks' seconds, `stages` their places along pp. Of two ranks the faster is the median.
    """
    middle = {
        stage: median_low(o for o, s in zip(own, stages, strict=True) if s == stage) for stage in set(stages)
    }
    ratios = [
        seconds / middle[stage] if middle[stage] > 0 else 1.0
        for seconds, stage in zip(own, stages, strict=True)
    ]
    rank = max(range(len(ratios)), key=ratios.__getitem__)
    return rank, ratios[rank]
