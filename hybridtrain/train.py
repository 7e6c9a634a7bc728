"""The training loop, phase by phase; and the run around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridtrain import checkpoint
from hybridtrain.assemble import Parts, assemble, make_addressing
from hybridtrain.data.batches import Batch, BatchLoader
from hybridtrain.data.prefetch import Prefetcher
from hybridtrain.diagnose import name_source_of_nonfinite
from hybridtrain.errors import TrainingError
from hybridtrain.evaluate import evaluate
from hybridtrain.memory import by_exchange
from hybridtrain.metrics import Clock, MetricsLog
from hybridtrain.model.statistics import apply_router_statistics, collect, no_statistics, reset
from hybridtrain.optim.groups import set_learning_rates
from hybridtrain.optim.schedule import lr_scale
from hybridtrain.parallel.collectives import Group, all_reduce_
from hybridtrain.parallel.dispatch import DispatchMemoryError
from hybridtrain.parallel.mesh import close_mesh
from hybridtrain.parallel.rows import StepPlan
from hybridtrain.report import Report
from hybridtrain.run_folder import RunFolder
from hybridtrain.settings import Settings
from hybridtrain.signals import StopSignal
from hybridtrain.weights import start_from
from hybridtrain.world import join_world


@dataclass(frozen=True)
class Totals:
    """What one step came to, over all ranks."""

    loss: float  # nats per token
    statistics: dict[str, Tensor]
    stop: bool
    grad_norm: float
    table_grad_norm: float


def train(settings: Settings, resume: bool = False) -> dict[str, Any]:
    """Run `settings.train.steps` steps, or with `resume` the rest of them; returns the summary that rank 0 writes.

    Raises UserError or LayoutError for what the user can mend.
    """
    mesh = join_world(settings)
    try:
        folder = RunFolder.open(settings, mesh.world, resume)
        vocabulary, dataset = folder.prepare_data(settings)
        addressing = make_addressing(settings, vocabulary)
        parts = assemble(settings, mesh, vocabulary, addressing)
        start = folder.restore(parts, addressing) if resume else 0
        if settings.train.init_from and not resume:
            source_run = checkpoint.place(settings.train.init_from, "train.init_from")
            start_from(parts, source_run, folder.path, dataset.manifest.tokenizer_xxh3)
        log = MetricsLog(folder.path, mesh.rank, start, settings.train.steps)
        report = Report(parts, log, folder.path, start)
        loader = BatchLoader(
            dataset.split("train"),
            settings.train.seq_len,
            settings.train.global_batch,
            settings.train.micro_batches,
            mesh.layout.coordinate(mesh.rank, "dp"),
            mesh.layout.dp,
            settings.run.seed,
        )

        def load(step: int) -> tuple[Batch, StepPlan | None]:
            batch = loader.load(step)
            plan = parts.memory.plan(batch) if parts.memory is not None else None  # from tokens on the CPU
            return batch.at(parts.positions), plan

        try:
            with (
                folder.saver(parts) as saver,
                Prefetcher(load, start, depth=1, stop_step=settings.train.steps) as source,
                StopSignal() as signal,
            ):
                return _loop(parts, saver, source, signal, report, lambda n: evaluate(parts, dataset.split("validation"), n), start)
        finally:
            log.close()
    except DispatchMemoryError as error:
        raise TrainingError(str(error)) from error
    finally:
        close_mesh()


def _loop(
    parts: Parts,
    saver: checkpoint.Saver,
    source: Prefetcher[tuple[Batch, StepPlan | None]],
    signal: StopSignal,
    report: Report,
    validate: Callable[[int], dict[str, float]],
    start: int,
) -> dict[str, Any]:
    settings, clock = parts.settings, report.clock
    steps, every = settings.train.steps, settings.checkpoint.every
    if start >= steps:
        return report.nothing_left(start)
    report.header()
    with clock.phase("data"):
        upcoming = source.get(start)
    if parts.memory is not None:
        parts.memory.resume(upcoming[1])
    for step in range(start, steps):
        batch, plan = upcoming
        with clock.phase("data"):
            upcoming = source.get(step + 1) if step + 1 < steps else (batch, None)
        stop = signal.received or saver.failed
        totals = train_step(parts, step, batch, plan, clock, stop, upcoming[1], saver.before_update)
        if not math.isfinite(totals.loss) or not math.isfinite(totals.grad_norm):
            where = name_source_of_nonfinite(parts, batch, plan)
            raise TrainingError(
                f"step {step + 1}: the loss is {totals.loss} and the gradient norm {totals.grad_norm}; {where}. "
                f"The last good checkpoint is {checkpoint.latest(saver.folder) or 'none'}; nothing of this step was kept"
            )
        done = step + 1
        report.step(done, totals, plan)
        if done == steps or (settings.train.eval_every and done % settings.train.eval_every == 0):
            with report.outside_training():
                report.validation(done, validate(settings.train.eval_batches if done < steps else 0))
        if done == steps or totals.stop or (every and done % every == 0):
            with report.outside_training():
                saver.save(done, wait=done == steps or totals.stop)
        if totals.stop:
            source.finish()  # ranks may have planned ahead by different numbers of steps
            return report.stopped(done, signal.name)
    return report.finish(steps)


def train_step(
    parts: Parts,
    step: int,
    batch: Batch,
    plan: StepPlan | None,
    clock: Clock,
    stop: bool,
    next_plan: StepPlan | None = None,
    before_update: Callable[[], None] | None = None,
) -> Totals:
    """One optimizer step (`step` counts from 0). Nothing is updated where the loss or the gradient is not finite.

    `next_plan` is the next step's, some of whose rows may come while this one computes; None: there is none.
    `before_update` is called before parameters and optimizer state change.
    """
    stages, memory, settings = parts.stages, parts.memory, parts.settings
    scale = lr_scale(step, settings.optim, settings.train.steps)
    table_lr = scale * settings.optim.lr * settings.memory.lr_multiplier
    parts.set_mode(training=True)
    loss = torch.zeros((), dtype=torch.float64, device=parts.mesh.device)
    rows_grad = memory.new_gradient(plan) if memory is not None and plan is not None else None
    groups = by_exchange(batch, plan, parts.mesh.device)

    for number, (exchange, micro_batches) in enumerate(groups, 1):
        if memory is not None and plan is not None and exchange is not None:
            with clock.phase("fetch"):
                memory.fetch(plan, exchange)
                memory.fetch_ahead(plan, number, next_plan, table_lr)
        loss += parts.schedule.step(micro_batches, number == len(groups), clock.phase)  # forward and backward
        if memory is not None and exchange is not None and rows_grad is not None:
            with clock.phase("push"):
                memory.push(exchange, rows_grad)

    with clock.phase("reduce"):
        if memory is not None and rows_grad is not None:
            memory.exchange.reduce_replicas(rows_grad)
        loss /= parts.mesh.layout.tp  # its ranks have the same losses
        statistics = no_statistics(settings) | {k: v for stage in stages for k, v in collect(stage).items()}
        sums = reduce_sums({"loss": loss, "stop": torch.tensor(float(stop)), **statistics}, parts.mesh.world)
        for stage in stages:
            reset(stage)
        norm, table_norm = parts.engine.clip(rows_grad, settings.optim.clip_norm)
    totals = Totals(float(sums.pop("loss")), sums, bool(sums.pop("stop") > 0), norm, table_norm)

    if math.isfinite(totals.loss) and math.isfinite(norm):
        with clock.phase("optimizer"):
            if before_update is not None:
                before_update()
            set_learning_rates(parts.engine.optimizers, scale)
            parts.engine.step()
            if memory is not None and plan is not None and rows_grad is not None:
                memory.update(plan, rows_grad, table_lr)
            for stage in stages:
                apply_router_statistics(stage, sums)
    parts.engine.clear_gradients()
    return totals


def reduce_sums(sums: dict[str, Tensor], group: Group) -> dict[str, Tensor]:
    """Sum every named tensor over the group's ranks, all in one collective, in float64."""
    device = next(iter(sums.values())).device
    flat = torch.cat([value.detach().to(device, torch.float64).flatten() for value in sums.values()])
    all_reduce_(flat, group)
    parts = flat.split([value.numel() for value in sums.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(sums.items(), parts, strict=True)}
