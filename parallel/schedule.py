"""What carries the micro-batches of one exchange through the model: here one after the other, in pipeline.py
over stages.

Legend: M micro-batches, B sequences, T tokens, L memory layers on this rank, S hash slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from hybridtrain.parallel.apply import sync_gradients

Phase = Callable[[str], AbstractContextManager[None]]  # times what runs inside it under a name


@dataclass(frozen=True)
class MicroBatches:
    """What a model needs of some micro-batches, on its device; their memory rows stand ready in the model."""

    tokens_MBT: Tensor
    documents_MBT: Tensor  # numbers of the documents inside each sequence
    targets_MBT: Tensor
    index: Sequence[Tensor] | None  # per micro-batch [B, T, L, S], places in its rows

    def __len__(self) -> int:
        return len(self.tokens_MBT)


class Schedule(Protocol):
    """Runs micro-batches through the parts of the model that this rank holds."""

    copies: Sequence[nn.Parameter]  # parameters here that another stage holds too, and counts and saves

    def step(self, batch: MicroBatches, last: bool, phase: Phase) -> Tensor:
        """Forward and backward of all micro-batches: the sum of their losses, each divided by the tokens of
        the step (float64).

        Gradients are added to the parameters', and with `last` (the step's last call) are complete over all
        ranks. The loss is zero on ranks without the model's head.
        """
        ...

    def losses(self, batch: MicroBatches) -> Tensor:
        """Forward only: each micro-batch's summed loss in nats `[M]`, float64; zeros on ranks without the
        model's head.
        """
        ...


class Accumulation:
    """The whole model on every rank, one micro-batch after the other."""

    copies: Sequence[nn.Parameter] = ()

    def __init__(self, model: nn.Module, tokens_per_step: int, device: torch.device) -> None:
        self.model, self.tokens_per_step, self.device = model, tokens_per_step, device

    def step(self, batch: MicroBatches, last: bool, phase: Phase) -> Tensor:
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for m in range(len(batch)):
            self._sync_gradients(
                last and m == len(batch) - 1
            )  # one reduction per step, whatever the number of micro-batches
            with phase("forward"):
                part = self._forward(batch, m) / self.tokens_per_step
            with phase("backward"):
                self._backward(part)
            loss += part.detach()
        return loss

    def _sync_gradients(self, on: bool) -> None:
        sync_gradients(self.model, on)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    @torch.no_grad()
    def losses(self, batch: MicroBatches) -> Tensor:
        return torch.stack([self._forward(batch, m).double() for m in range(len(batch))])

    def _forward(self, batch: MicroBatches, m: int) -> Tensor:
        index = batch.index[m] if batch.index is not None else None
        loss: Tensor = self.model(batch.tokens_MBT[m], batch.documents_MBT[m], index, m, batch.targets_MBT[m])
        return loss
