"""The native engine on parameters that ranks hold whole: ZeRO 0 and 1 (replicas.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hybridtrain.parallel.engine import NativeEngine, global_squares, local_gradients
from hybridtrain.parallel.interfaces import Schedule
from hybridtrain.parallel.mesh import Mesh
from hybridtrain.parallel.replicas import Replicas


class ReplicaEngine(NativeEngine):
    """An `Engine` whose optimizers update what `replicas.updated_here` gives for each parameter."""

    def __init__(
        self,
        stages: Sequence[nn.Module],
        schedule: Schedule,
        optimizers: Sequence[torch.optim.Optimizer],
        mesh: Mesh,
        replicas: Replicas,
    ) -> None:
        super().__init__(stages, schedule, optimizers, mesh)
        self.name = f"native, ZeRO {1 if replicas.shared else 0}"
        self.replicas = replicas
        trained = {id(p) for p in self._params()}
        every = {parameter: None for stage in stages for parameter in stage.parameters()}
        self.updated = {
            p: x for p in every if (x := replicas.updated_here(p)) is not None and id(x) in trained
        }
        for parameter, value in self.updated.items():
            if value is not parameter:
                value.grad = replicas.gradient(parameter)
        for stage in stages:
            stage.register_forward_pre_hook(lambda *_: replicas.await_parameters())
            stage.register_state_dict_pre_hook(lambda *_: replicas.await_parameters())

    def squares(self, rows_ND: Tensor | None) -> Tensor:
        self.replicas.end_sums()
        copies = {*self.schedule.copies}  # another pipeline stage counts them
        counted = [p for p, value in self.updated.items() if p not in copies and value.grad is not None]
        grads = local_gradients(self.updated[p] for p in counted)
        return global_squares(grads, rows_ND, self.mesh, [self.replicas.updated_by(p) for p in counted])

    def step(self) -> None:
        super().step()
        self.replicas.spread()

    def clear_gradients(self) -> None:
        self.replicas.clear()
        for parameter, value in self.updated.items():
            if value is parameter:
                parameter.grad = None

    def updated_here(self, parameter: nn.Parameter) -> Tensor | None:
        return self.replicas.updated_here(parameter)

    def allocate_state(self) -> None:
        self.replicas.zero()
        for parameter, value in self.updated.items():
            if value is parameter:
                parameter.grad = torch.zeros_like(parameter)
        self._step_without_effect()
        self.clear_gradients()

    def state(self, stage: int, with_copies: bool = True) -> dict[str, Tensor]:
        self.replicas.await_parameters()
        return super().state(stage, with_copies)

    def load_state(self, stage: int, state: dict[str, Tensor]) -> None:
        """Parameters that compute in another dtype are made of what was read, by the ranks that update it."""
        self.replicas.spread()
        self.replicas.await_parameters()
