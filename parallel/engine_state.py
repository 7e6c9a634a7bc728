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
        values = (
            model.state_dict()
        )  # first: it puts FSDP's sharded parameters back, which a forward pass may have left gathered
        copies = set() if with_copies else set(self.schedule.copies)
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        left_out = {names[parameter] for parameter in copies if parameter in names}
        state: dict[str, Tensor] = {
            f"model.{name}": value for name, value in values.items() if name not in left_out
        }
        for optimizer in self.optimizers:
            for parameter, slots in optimizer.state.items():
                if (name := names.get(parameter)) is not None and name not in left_out:
                    state |= {
                        f"optim.{name}.{key}": value
                        for key, value in slots.items()
                        if isinstance(value, Tensor)
                    }
        return state

    def load_state(self, stage: int, state: dict[str, Tensor]) -> None:
        """Nothing to do: `state` returned the tensors themselves."""
