"""The native engine's state in checkpoints: parameters, and what torch's optimizers keep of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hybridtrain.parallel.interfaces import Schedule


class EngineState:
    """The part of an engine that saves and loads; `stages`, `optimizers` and `schedule` are the engine's."""

    stages: Sequence[nn.Module]
    optimizers: Sequence[torch.optim.Optimizer]
    schedule: Schedule

    def updated_here(self, parameter: nn.Parameter) -> Tensor | None:
        """What an optimizer of this rank updates in the parameter's place; None: another rank does."""
        return parameter

    def allocate_state(self) -> None:
        """By a step that changes nothing."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
        self._step_without_effect()
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def _step_without_effect(self) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0  # the loop sets it anew before every step
            optimizer.step()

    def state(self, stage: int, with_copies: bool = True) -> dict[str, Tensor]:
        model = self.stages[stage]
        # first: it puts FSDP's sharded parameters back, which a forward pass may have left gathered
        values: dict[str, Tensor] = model.state_dict()
        copies = set() if with_copies else {*self.schedule.copies}
        optim: dict[str, Tensor] = {}
        slots = {p: x for optimizer in self.optimizers for p, x in optimizer.state.items()}
        for name, parameter in model.named_parameters():
            updated = self.updated_here(parameter)
            if parameter in copies:
                values.pop(name, None)
                continue
            if parameter.dtype != torch.float32 and name in values:  # the one that is updated is float32
                values.pop(name)
                values |= {} if updated is None else {name: updated}
            state = slots.get(updated, {}) if updated is not None else {}
            optim |= {f"optim.{name}.{k}": value for k, value in state.items() if isinstance(value, Tensor)}
        return {f"model.{name}": value for name, value in values.items()} | optim

    def load_state(self, stage: int, state: dict[str, Tensor]) -> None:
        """Nothing to do: `state` returned the tensors themselves."""
