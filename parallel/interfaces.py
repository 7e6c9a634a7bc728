"""What a schedule, which runs micro-batches through a model, and an engine, which updates it, must provide.

Legend: M micro-batches, N table rows, D row width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hybridtrain.parallel.engine import MicroBatches

Phase = Callable[[str], AbstractContextManager[None]]  # times what runs inside it under a name


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


class Engine(Protocol):
    """Holds the parameters of this rank's part of the model and their optimizers' state, however these are
    cut.
    """

    name: str  # for the header of a run
    schedule: Schedule  # what fills the gradients
    optimizers: Sequence[torch.optim.Optimizer]  # their groups' learning rates are those of the next step

    def squares(self, rows_ND: Tensor | None) -> Tensor:
        """Complete the step's gradients over ranks; their squared norms, the table's rows beside them: see
        `global_squares`.
        """
        ...

    def clip(self, rows_ND: Tensor | None, norm: float, bound: float) -> None:
        """Scale the step's gradients, and those of the table's rows, from the global norm `norm` to at most
        `bound`.
        """
        ...

    def step(self) -> None:
        """Update the parameters from their gradients."""
        ...

    def clear_gradients(self) -> None:
        """Forget the gradients, whether a step was made of them or not."""
        ...

    def allocate_state(self) -> None:
        """Give the optimizers the state that they otherwise allocate in their first step, so that `state` has
        all of it.
        """
        ...

    def state(self, stage: int, with_copies: bool = True) -> dict[str, Tensor]:
        """`model.*` and `optim.<parameter>.*` of one of this rank's stages by their names in the whole model.

        DTensors carry their own place in the whole. What another stage counts and saves is left out without
        `with_copies`.
        """
        ...

    def load_state(self, stage: int, state: dict[str, Tensor]) -> None:
        """Take in what `state` returned, after a checkpoint was read into it."""
        ...
