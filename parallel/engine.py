"""What makes an update of a step's gradients, and its state in checkpoints: the native engine; deepspeed.py has the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from hybridtrain.parallel.mesh import Mesh
from hybridtrain.parallel.norms import clip_, global_squares, local_gradients, sum_over_tp, tp_copies
from hybridtrain.parallel.schedule import Schedule


class Engine(Protocol):
    """Holds the parameters of this rank's part of the model and their optimizers' state, however these are cut."""

    name: str  # for the header of a run
    schedule: Schedule  # what fills the gradients
    optimizers: Sequence[torch.optim.Optimizer]  # their groups' learning rates are those of the next step

    def squares(self, rows_ND: Tensor | None) -> Tensor:
        """Complete the step's gradients over ranks; their squared norms, the table's rows beside them: see `global_squares`."""
        ...

    def clip(self, rows_ND: Tensor | None, norm: float, bound: float) -> None:
        """Scale the step's gradients, and those of the table's rows, from the global norm `norm` to at most `bound`."""
        ...

    def step(self) -> None:
        """Update the parameters from their gradients."""
        ...

    def clear_gradients(self) -> None:
        """Forget the gradients, whether a step was made of them or not."""
        ...

    def allocate_state(self) -> None:
        """Give the optimizers the state that they otherwise allocate in their first step, so that `state` has all of it."""
        ...

    def state(self, stage: int, with_copies: bool = True) -> dict[str, Tensor]:
        """`model.*` and `optim.<parameter>.*` of one of this rank's stages by their names in the whole model.

        DTensors carry their own place in the whole. What another stage counts and saves is left out without `with_copies`.
        """
        ...

    def load_state(self, stage: int, state: dict[str, Tensor]) -> None:
        """Take in what `state` returned, after a checkpoint was read into it."""
        ...


class NativeEngine:
    """Parameters as `apply.parallelize` left them, plain or sharded by FSDP2, and torch's optimizers on them."""

    name = "native"

    def __init__(
        self, stages: Sequence[nn.Module], schedule: Schedule, optimizers: Sequence[torch.optim.Optimizer], mesh: Mesh
    ) -> None:
        self.stages, self.schedule, self.optimizers, self.mesh = stages, schedule, optimizers, mesh

    def squares(self, rows_ND: Tensor | None) -> Tensor:
        params = self._params()
        sum_over_tp(params, self.mesh.tp)
        copies = {id(p) for p in self.schedule.copies}  # another pipeline stage counts them
        counted = [p for p in params if id(p) not in copies]
        return global_squares(local_gradients(counted), rows_ND, self.mesh, tp_copies(counted, self.mesh.tp))

    def clip(self, rows_ND: Tensor | None, norm: float, bound: float) -> None:
        clip_([*local_gradients(self._params()), *([] if rows_ND is None else [rows_ND])], norm, bound)

    def _params(self) -> list[Tensor]:
        return [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def clear_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def allocate_state(self) -> None:
        """By a step that changes nothing."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0  # the loop sets it anew before every step
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()

    def state(self, stage: int, with_copies: bool = True) -> dict[str, Tensor]:
        model = self.stages[stage]
        values = model.state_dict()  # first: it puts FSDP's sharded parameters back, which a forward pass may have left gathered
        copies = set() if with_copies else set(self.schedule.copies)
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        left_out = {names[parameter] for parameter in copies if parameter in names}
        state: dict[str, Tensor] = {f"model.{name}": value for name, value in values.items() if name not in left_out}
        for optimizer in self.optimizers:
            for parameter, slots in optimizer.state.items():
                if (name := names.get(parameter)) is not None and name not in left_out:
                    state |= {f"optim.{name}.{key}": value for key, value in slots.items() if isinstance(value, Tensor)}
        return state

    def load_state(self, stage: int, state: dict[str, Tensor]) -> None:
        """Nothing to do: `state` returned the tensors themselves."""
