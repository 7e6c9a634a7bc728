"""One step of training: fetch table rows, forward and backward, push gradients, update.

Everything that is computed is called from `train_step`; the loop around it is in loop.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from hybridtrain.data.batches import Batch
from hybridtrain.model.common import collect, learn, reset
from hybridtrain.optim.schedule import lr_scale, set_learning_rates
from hybridtrain.parallel.collectives import Group, all_reduce_
from hybridtrain.parallel.engine import MicroBatches, norms_of
from hybridtrain.parallel.interfaces import Phase
from hybridtrain.parallel.row_exchange import RowPlan, StepPlan
from hybridtrain.run.assemble import Run


@dataclass(frozen=True)
class StepInput:
    """What a step trains on.

    plan: the table rows that the batch needs; None where the model has no table
    next_plan: of the step after it, some of whose rows may come while this one computes; None: no such step
    """

    batch: Batch
    plan: StepPlan | None = None
    next_plan: StepPlan | None = None


@dataclass(frozen=True)
class Hooks:
    """What a step calls of its surroundings; the defaults are for a step that stands alone.

    phase: times what runs inside it under a name
    before_update: called before parameters and optimizer state change
    asked: whether this rank was asked to stop, and to save. It is called behind the backward passes, so that
        what is asked for during them does not wait for another step
    accepts: whether an update is made of a step with this loss and gradient norm
    """

    phase: Phase = lambda _: nullcontext()
    before_update: Callable[[], None] = lambda: None
    asked: Callable[[], tuple[bool, bool]] = lambda: (False, False)
    accepts: Callable[[float, float], bool] = lambda loss, norm: math.isfinite(loss) and math.isfinite(norm)


ALONE = Hooks()


@dataclass(frozen=True)
class Totals:
    """What one step came to, over all ranks.

    loss: nats per token
    statistics: the sums of `model.common.collect`, a list of one for a single number
    stop, save: whether any rank was asked to
    kept: whether the update was made
    """

    loss: float
    statistics: dict[str, list[float]]
    stop: bool
    save: bool
    grad_norm: float
    table_grad_norm: float
    kept: bool


def train_step(run: Run, number: int, data: StepInput, hooks: Hooks = ALONE) -> Totals:
    """Step `number` (from 0). Nothing is updated where `hooks.accepts` refuses its loss and gradient norm.

    Collective: all ranks call it for the same step.
    """
    table, engine, plan = run.table, run.engine, data.plan
    scale = lr_scale(number, run.settings.optim, run.settings.train.steps)
    table_lr = scale * run.settings.optim.lr * run.settings.engram.lr_multiplier
    for stage in run.model_parts:
        stage.train()
    loss = torch.zeros((), dtype=torch.float64, device=run.mesh.device)
    rows_grad = table.new_gradient(plan) if table is not None and plan is not None else None
    groups = by_exchange(data.batch, plan, run.mesh.device)

    for place, (exchange, micro_batches) in enumerate(groups, 1):
        if table is not None and plan is not None and exchange is not None:
            with hooks.phase("fetch"):
                table.fetch(plan, exchange)
                table.fetch_ahead(plan, place, data.next_plan, table_lr)
        loss += engine.schedule.step(micro_batches, place == len(groups), hooks.phase)  # forward and backward
        if table is not None and exchange is not None and rows_grad is not None:
            with hooks.phase("push"):
                table.push(exchange, rows_grad)

    with hooks.phase("reduce"):
        if table is not None and rows_grad is not None:
            table.exchange.reduce_replicas(rows_grad)
        loss /= run.mesh.layout.tp  # its ranks have the same losses
        sums = _sum_up(run, loss, *hooks.asked())
        totals = _read(sums, engine.squares(rows_grad), hooks.accepts)
        engine.clip(rows_grad, totals.grad_norm, run.settings.optim.clip_norm)

    if totals.kept:
        with hooks.phase("optimizer"):
            hooks.before_update()
            set_learning_rates(engine.optimizers, scale)
            engine.step()
            if table is not None and plan is not None and rows_grad is not None:
                table.update(plan, rows_grad, table_lr)
            for stage in run.model_parts:
                learn(stage, sums)
    engine.clear_gradients()
    return totals


def by_exchange(
    batch: Batch, plan: StepPlan | None, device: torch.device
) -> list[tuple[RowPlan | None, MicroBatches]]:
    """The batch on the device, cut into the micro-batches that each of the plan's exchanges serves."""
    exchanges: Sequence[RowPlan | None] = plan.exchanges if plan is not None else [None]
    whole = (batch.tokens, batch.starts.cumsum(-1), batch.targets)
    tokens, documents, targets = (_upload(t, device).chunk(len(exchanges)) for t in whole)
    indices = [exchange.index if exchange is not None else None for exchange in exchanges]
    cut = zip(tokens, documents, targets, indices, strict=True)
    return list(zip(exchanges, (MicroBatches(*group) for group in cut), strict=True))


def _upload(x: Tensor, device: torch.device) -> Tensor:
    """To a GPU by way of a pinned buffer: the host does not wait until the device has come so far."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def _sum_up(run: Run, loss: Tensor, stop: bool, save: bool) -> dict[str, Tensor]:
    """The step's loss, whether any rank was asked to stop or save, and the model's statistics, over all
    ranks; on the device.
    """
    device = run.mesh.device  # numbers are made there: to bring them from the host would wait for the device
    sums = {"loss": loss}
    sums |= {n: torch.full((), float(on), device=device) for n, on in (("stop", stop), ("save", save))}
    # zeros for the layers of other ranks
    zeros = {shape: torch.zeros(shape, dtype=torch.float64, device=device) for shape in {*run.sums.values()}}
    sums |= {name: zeros[shape] for name, shape in run.sums.items()}
    for stage in run.model_parts:
        sums |= collect(stage)
        reset(stage)
    return _reduce(sums, run.mesh.world)


def _reduce(sums: dict[str, Tensor], group: Group) -> dict[str, Tensor]:
    """Sum every named tensor over the group's ranks, all in one collective, in float64."""
    device = next(iter(sums.values())).device
    flat = torch.cat([value.detach().to(device, torch.float64).flatten() for value in sums.values()])
    if group.size > 1:
        all_reduce_(flat, group)
    parts = flat.split([value.numel() for value in sums.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(sums.items(), parts, strict=True)}


def _read(sums: dict[str, Tensor], squares: Tensor, accepts: Callable[[float, float], bool]) -> Totals:
    """`_sum_up` and `Engine.squares` as numbers."""
    numbers = _read_at_once({**sums, "squares": squares})
    norm, table_norm = norms_of(numbers.pop("squares"))
    (loss,), (stop,), (save,) = (numbers.pop(name) for name in ("loss", "stop", "save"))
    return Totals(loss, numbers, stop > 0, save > 0, norm, table_norm, kept=accepts(loss, norm))


def _read_at_once(values: dict[str, Tensor]) -> dict[str, list[float]]:
    """Every tensor's elements as numbers; the host waits for the device once, not once a tensor."""
    numbers = iter(torch.cat([value.flatten() for value in values.values()]).tolist())
    return {name: list(islice(numbers, value.numel())) for name, value in values.items()}
