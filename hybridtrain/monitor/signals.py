"""SIGTERM and Ctrl-C as a request: the loop finishes its step or leaves its validation, saves and ends. A
second one ends at once. SIGUSR1: it saves."""

from __future__ import annotations

import signal
from types import FrameType

import torch

from hybridtrain.parallel.collectives import all_reduce_
from hybridtrain.parallel.mesh import Mesh


def agree(asked: bool, mesh: Mesh) -> bool:
    """Whether any rank was asked; the same on all of them, which call this at the same place."""
    flag = torch.tensor(float(asked), device=mesh.device)
    return bool(all_reduce_(flag, mesh.world) > 0)


class StopSignal:
    """While entered, the first SIGTERM or SIGINT sets `received`; the next one acts as it would without this.

    SIGUSR1 sets `save`, which whoever saves clears.
    """

    def __init__(self) -> None:
        self.received = self.save = False
        self.name = ""
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)
        self._previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._on_save)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received and signal.Signals(number).name == self.name:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received, self.name = True, signal.Signals(number).name

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self.save = True
