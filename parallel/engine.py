"""How gradients are computed and applied: the schedule that runs micro-batches through the model, and the
engine that makes an update of their gradients and knows its state in checkpoints.

Here are the schedule of one stage and the native engine; interfaces.py says what both must do, pipeline.py
has the schedules over stages, deepspeed.py the other engine.

Legend: M micro-batches, B sequences, T tokens, L Engram layers on this rank, S hash slots, N table rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hybridtrain.parallel.collectives import Group, all_reduce_
from hybridtrain.parallel.engine_state import EngineState
from hybridtrain.parallel.interfaces import Phase, Schedule
from hybridtrain.parallel.mesh import Mesh


@dataclass(frozen=True)
class MicroBatches:
    """What a model needs of some micro-batches, on its device; their table rows stand ready in the model."""

    tokens_MBT: Tensor
    documents_MBT: Tensor  # numbers of the documents inside each sequence
    targets_MBT: Tensor
    index: Sequence[Tensor] | None  # per micro-batch [B, T, L, S], places in its rows

    def __len__(self) -> int:
        return len(self.tokens_MBT)


class Accumulation:
    """The whole model on every rank, one micro-batch after the other."""

    copies: Sequence[nn.Parameter] = ()

    def __init__(
        self,
        model: nn.Module,
        tokens_per_step: int,
        device: torch.device,
        expect_last: Callable[[bool], None] | None = None,
    ) -> None:
        """`expect_last` is told before each backward pass whether it completes the gradients."""
        self.model, self.tokens_per_step, self.device = model, tokens_per_step, device
        self.expect_last = expect_last or functools.partial(sync_gradients, model)

    def step(self, batch: MicroBatches, last: bool, phase: Phase) -> Tensor:
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        for m in range(len(batch)):
            # one reduction over ranks per step, whatever the number of micro-batches
            self.expect_last(last and m == len(batch) - 1)
            with phase("forward"):
                part = self._forward(batch, m) / self.tokens_per_step
            with phase("backward"):
                self._backward(part)
            loss += part.detach()
        return loss

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    @torch.no_grad()
    def losses(self, batch: MicroBatches) -> Tensor:
        return torch.stack([self._forward(batch, m).double() for m in range(len(batch))])

    def _forward(self, batch: MicroBatches, m: int) -> Tensor:
        index = batch.index[m] if batch.index is not None else None
        loss: Tensor = self.model(batch.tokens_MBT[m], batch.documents_MBT[m], index, m, batch.targets_MBT[m])
        return loss


def sync_gradients(model: nn.Module, on: bool) -> None:
    """Whether the next backward pass reduces gradients over ranks; off for all micro-batches of a step but
    the last.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)


class NativeEngine(EngineState):
    """Parameters as `apply.parallelize` left them, plain or sharded by FSDP2, and their torch optimizers."""

    name = "native"

    def __init__(
        self,
        stages: Sequence[nn.Module],
        schedule: Schedule,
        optimizers: Sequence[torch.optim.Optimizer],
        mesh: Mesh,
    ) -> None:
        self.stages, self.schedule, self.optimizers, self.mesh = stages, schedule, optimizers, mesh

    def squares(self, rows_ND: Tensor | None) -> Tensor:
        params = self._params()
        sum_over_tp(params, self.mesh.tp)
        copies = {id(p) for p in self.schedule.copies}  # another pipeline stage counts them
        counted = [p for p in params if id(p) not in copies]
        held_by = [n * self.mesh.layout.dp_replicate for n in tp_copies(counted, self.mesh.tp)]
        return global_squares(local_gradients(counted), rows_ND, self.mesh, held_by)

    def clip(self, rows_ND: Tensor | None, norm: float, bound: float) -> None:
        clip_([*local_gradients(self._params()), *([] if rows_ND is None else [rows_ND])], norm, bound)

    def _params(self) -> list[Tensor]:
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return [p for group in groups for p in group["params"]]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def clear_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def local_gradients(params: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of every gradient that exists."""
    grads = [p.grad for p in params if p.grad is not None]
    return [g.to_local() if isinstance(g, DTensor) else g for g in grads]


def sum_over_tp(params: Iterable[Tensor], tp: Group) -> None:
    """Add up, in one collective, the gradients of the parameters that every rank of `tp` holds whole and uses
    on its own tokens.
    """
    if tp.size == 1:
        return
    grads = local_gradients(p for p in params if _is_copied(p))
    if not grads:
        return
    flat = all_reduce_(torch.cat([grad.flatten() for grad in grads]), tp)
    for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(total.view_as(grad))


def tp_copies(params: Iterable[Tensor], tp: Group) -> list[int]:
    """How many ranks of `tp` hold the same part, for each gradient of `local_gradients`."""
    return [tp.size if _is_copied(p) else 1 for p in params if p.grad is not None]


def _is_copied(param: Tensor) -> bool:
    """Whether neither tp nor the fold of the experts cuts the parameter: it then lies on the data-parallel
    ranks alone.
    """
    names = param.device_mesh.mesh_dim_names or () if isinstance(param, DTensor) else ()
    return not {"tp", "edp"} & set(names)


def global_squares(grads: list[Tensor], rows_ND: Tensor | None, mesh: Mesh, held_by: Sequence[int]) -> Tensor:
    """The squared L2 norms of all gradients over all ranks: of the backbone and of the table's rows, `[2]`
    float64 on the device.

    `grads` are this rank's parts of the backbone, of each of which as many ranks have the same as `held_by`
    says; `rows_ND` is the gradient of this rank's touched rows, which every replica of the table holds. The
    host does not wait for the result.
    """
    squares = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    if grads:
        times = _times_counted(tuple(held_by), grads[0].device)
        squares[0] = (_squares(grads) / times).sum()
    if rows_ND is not None:
        squares[1] = _squares([rows_ND])[0] / mesh.mem_replicate.size
    return all_reduce_(squares, mesh.world) if mesh.world.size > 1 else squares


def norms_of(squares: Sequence[float]) -> tuple[float, float]:
    """(global norm, table's norm) of the two numbers that `global_squares` gave."""
    backbone, table = squares
    return (backbone + table) ** 0.5, table**0.5


def clip_(grads: Sequence[Tensor], norm: float, bound: float) -> None:
    """Scale all gradients in place so that the global norm `norm` becomes at most `bound` (0: leave them)."""
    if bound > 0 and norm > bound:
        torch._foreach_mul_(list(grads), bound / (norm + 1e-6))


@functools.lru_cache(maxsize=8)  # the same in every step; an upload would wait for the device
def _times_counted(held_by: tuple[int, ...], device: torch.device) -> Tensor:
    """On how many ranks each gradient is counted: [gradients] float64."""
    return torch.tensor(held_by, dtype=torch.float64, device=device)


def _squares(tensors: list[Tensor]) -> Tensor:
    """The squared L2 norm of each tensor, in float64.

    On the CPU by way of its rows: a norm of all at once runs there on one core and in one float32 sum, 6e-4
    off for 16 M elements.
    """
    if tensors[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(tensors)).double().square()
    rows = [torch.linalg.vector_norm(t, dim=-1).double() for t in tensors]
    return torch.stack([row.square().sum() for row in rows])
