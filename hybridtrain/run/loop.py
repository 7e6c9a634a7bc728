"""The training loop, phase by phase; and the run around it."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Collection
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridtrain import checkpoint
from hybridtrain.checkpoint import Consumed
from hybridtrain.console import say
from hybridtrain.data.batches import Batch, BatchLoader
from hybridtrain.data.prefetch import StepPrefetcher
from hybridtrain.data.shards import TokenDataset
from hybridtrain.errors import TrainingError
from hybridtrain.kernels.engram_hash.addressing import Addressing
from hybridtrain.model.statistics import apply_router_statistics, collect, no_statistics, reset
from hybridtrain.monitor.loss_spikes import all_finite
from hybridtrain.monitor.metrics import Clock, MetricsLog, Totals
from hybridtrain.monitor.signals import StopSignal
from hybridtrain.monitor.watchdog import Watchdog
from hybridtrain.optim.groups import set_learning_rates
from hybridtrain.optim.schedule import lr_scale
from hybridtrain.parallel.collectives import Group, all_reduce_, gather_objects
from hybridtrain.parallel.engine import norms_of
from hybridtrain.parallel.experts import DispatchMemoryError
from hybridtrain.parallel.mesh import close_mesh
from hybridtrain.parallel.row_exchange import StepPlan
from hybridtrain.run.assemble import Run, assemble, make_addressing
from hybridtrain.run.init_from import start_from
from hybridtrain.run.nonfinite import name_source_of_nonfinite
from hybridtrain.run.pause import Pause, Validate
from hybridtrain.run.process_setup import join_world
from hybridtrain.run.report import Report
from hybridtrain.run.resume import Continuation, Reading
from hybridtrain.run.run_folder import RunFolder, RunLocks
from hybridtrain.run.validation import evaluate
from hybridtrain.run.writable import check_folders, unusable_folders
from hybridtrain.settings.tree import Settings
from hybridtrain.table.lookup_table import by_exchange

DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE),
    *(
        errno.EACCES,
        errno.EPERM,
        errno.EISDIR,
        errno.ENOTDIR,
    ),  # of what another user left in the folder, or by hand
)
Step = tuple[Batch, StepPlan | None]
Info = dict[str, Any]  # what a checkpoint says of itself


def train(settings: Settings, resume: bool | None = False, allow: Collection[str] = ()) -> dict[str, Any]:
    """Run `settings.train.steps` steps, or with `resume` the rest of them; returns the summary that rank 0
    writes.

    `resume` None: the rest where the run folder has a checkpoint, else all. `allow`: what of resume.ALLOWABLE
    may differ from the checkpoint's. Raises UserError or LayoutError for what the user can mend.
    """
    mesh, locks = join_world(settings), None
    try:
        check_folders(settings, gather_objects(unusable_folders(settings), mesh.world))
        locks = RunLocks(settings, mesh.world)
        locks.take()
        if resume is None:
            resume = any(gather_objects(RunFolder.of(settings, mesh.world).has_checkpoint, mesh.world))
        folder = RunFolder.open(settings, mesh.world, resume)
        folder.confirm = locks.confirm
        vocabulary, dataset = folder.prepare_data(settings)
        addressing = make_addressing(settings, vocabulary)
        run = assemble(settings, mesh, vocabulary, addressing)
        if settings.train.init_from and not resume:
            source_run = checkpoint.open_storage(settings.train.init_from, "train.init_from")
            start_from(run, source_run, folder.path, dataset.manifest)
        clock = Clock(mesh.device)
        stalls = folder.path / "stalls" / gather_objects(time.strftime("%Y%m%d-%H%M%S"), mesh.world)[0]
        with Watchdog(mesh.world, clock, stalls, settings.parallel.timeout):
            data = Continuation(settings, dataset, allow)
            before = _restore(folder, run, addressing, clock, data.check) if resume else None
            return _run(
                run, folder, dataset, data, lambda: _restore(folder, run, addressing, clock), clock, before
            )
    except DispatchMemoryError as error:
        raise TrainingError(str(error)) from error
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        last = checkpoint.latest(RunFolder.of(settings, mesh.world).checkpoints)
        message = f"{error.filename or settings.run.dir}: {error.strerror}; the last good checkpoint is {last or 'none'}"
        raise TrainingError(message) from error
    finally:
        if locks is not None:
            locks.release()
        close_mesh()


def _run(
    run: Run,
    folder: RunFolder,
    dataset: TokenDataset,
    data: Continuation,
    restore: Callable[[], Info],
    clock: Clock,
    before: Info | None,
) -> dict[str, Any]:
    """From the checkpoint that says `before` of itself, or the start, to the end; the summary."""
    settings, mesh = run.settings, run.mesh
    start = before["step"] if before else 0
    if before and mesh.rank == 0 and (lines := data.told(folder.restored, before, mesh.layout.describe())):
        say("\n".join(lines))
    loader = BatchLoader(
        dataset.split("train"),
        settings.train.seq_len,
        settings.train.global_batch,
        settings.train.micro_batches,
        mesh.layout.coordinate(mesh.rank, "dp"),
        mesh.layout.dp,
        settings.run.seed,
        data.position(before) if before else None,
        start + run.guard.skipped_batches,
    )
    reading = Reading(
        loader, run.guard, settings.run.seed, data.digests, Consumed.of(before) if before else None
    )
    log = MetricsLog(folder.path, mesh.rank, start, settings.train.steps, folder.confirm)
    report = Report(run, log, folder.path, clock, start, reading)

    def load(step: int) -> Step:
        batch = loader.load(step)
        plan = run.table.plan(batch) if run.table is not None else None  # from tokens on the CPU
        return batch.at(run.positions), plan

    def validate(batches: int, go_on: Callable[[], bool]) -> dict[str, float]:
        return evaluate(run, dataset.split("validation"), batches, go_on)

    try:
        with (
            folder.saver(run, reading.describe) as saver,
            StepPrefetcher(load, settings.train.steps) as feed,
            StopSignal() as signal,
        ):

            def go_back() -> int:
                info = restore()
                saver.base = folder.base
                reading.tokens = Consumed.of(info).tokens
                return int(info["step"])

            return _loop(run, saver, go_back, feed, signal, report, validate, start)
    finally:
        log.close()


def _restore(
    folder: RunFolder,
    run: Run,
    addressing: Addressing | None,
    clock: Clock,
    check: Callable[[Path, Info], None] = lambda *_: None,
) -> Info:
    """Load the latest good checkpoint; what it says of itself. No phase of a step, but one in which ranks may
    stand still.
    """
    with clock.phase("restore"):
        info = folder.restore(run, addressing, check)
    clock.take()
    return info


def _loop(
    run: Run,
    saver: checkpoint.Saver,
    restore: Callable[[], int],
    feed: StepPrefetcher[Step],
    signal: StopSignal,
    report: Report,
    validate: Validate,
    start: int,
) -> dict[str, Any]:
    steps, clock, guard = run.settings.train.steps, report.clock, run.guard
    if start > steps or (start == steps and gather_objects(report.ended(), run.mesh.world)[0]):
        return report.nothing_left(start)
    report.header()
    pause, done = Pause(run, saver, signal, report, validate), start
    if start == steps:  # it was cut off in its last validation
        report.recall()
    stop = pause.validates(start) and pause.validation(start, again=True)
    upcoming = _begin(run, feed, clock, start) if start < steps and not stop else None
    while upcoming is not None:
        step, (batch, plan) = done, upcoming
        done, clock.step = step + 1, step + 1
        with clock.phase("data"):
            upcoming = feed.get(done) if done < steps else None
        totals = train_step(
            run,
            step,
            batch,
            plan,
            clock,
            upcoming[1] if upcoming is not None else None,
            saver.before_update,
            asked=lambda: (signal.received or saver.failed, signal.save),
            accepts=guard.accepts,
        )
        if totals.kept:
            guard.took(done, totals.loss)
            report.reading.took(step)
            report.step(done, totals, plan)
        elif _refuse(run, saver, report, done, batch, plan, totals) == "rollback":
            data, done = done + guard.skipped_batches, restore()
            guard.skipped_batches = data - done  # the refused batch and those before it are not read again
            report.rolled_back(done)
            stop = pause.validates(done) and pause.validation(done, again=True)
            upcoming = _begin(run, feed, clock, done) if not stop else None
            continue
        if stop := pause.after(done, totals.stop, totals.save):
            break
    saver.finish()
    if stop:
        feed.finish()  # ranks may have planned ahead by different numbers of steps
        return report.stopped(done, signal.name)
    return report.finish(steps)


def _begin(run: Run, feed: StepPrefetcher[Step], clock: Clock, step: int) -> Step:
    """The batch of step `step`, which nothing was done for ahead but what a checkpoint holds."""
    with clock.phase("data"):
        first = feed.begin(step, run.guard.skipped_batches)
    if run.table is not None:
        run.table.resume(first[1])
    return first


def _refuse(
    run: Run,
    saver: checkpoint.Saver,
    report: Report,
    done: int,
    batch: Batch,
    plan: StepPlan | None,
    totals: Totals,
) -> str:
    """What `train.on_spike` says to do about a step that was not made: "skip" or "rollback"; raises
    TrainingError to stop.
    """
    train, action = run.settings.train, run.settings.train.on_spike
    saver.finish()
    last = checkpoint.latest(saver.folder)
    what = run.guard.describe(totals.loss, totals.grad_norm)
    allowed = run.guard.refuse(done)
    if action == "stop" or not allowed or (action == "rollback" and last is None):
        if not all_finite(totals.loss, totals.grad_norm):
            what += f"; {name_source_of_nonfinite(run, batch, plan)}"
        if not allowed:
            what += f"; that is more than train.spike_limit={train.spike_limit} in a row"
        raise TrainingError(
            f"step {done}: {what}. The last good checkpoint is {last or 'none'}; nothing of this step was "
            "kept"
        )
    if run.table is not None and (action == "rollback" or run.settings.engram.fetch == "overlap"):
        run.table.forget_ahead()  # rows as they would be after the update
    report.refused(done, what, action, totals.loss)
    return action


def train_step(
    run: Run,
    step: int,
    batch: Batch,
    plan: StepPlan | None,
    clock: Clock,
    next_plan: StepPlan | None = None,
    before_update: Callable[[], None] | None = None,
    *,
    asked: Callable[[], tuple[bool, bool]] = lambda: (False, False),
    accepts: Callable[[float, float], bool] = all_finite,
) -> Totals:
    """One optimizer step (`step` counts from 0). Nothing is updated where `accepts` refuses its loss and
    gradient norm.

    `next_plan` is the next step's, some of whose rows may come while this one computes; None: there is none.
    `asked` says whether this rank was asked to stop, and to save, and is called behind the backward passes,
    so that what is asked for during them does not wait for another step; the totals say whether any rank was.
    `before_update` is called before parameters and optimizer state change.
    """
    stages, table, settings = run.model_parts, run.table, run.settings
    scale = lr_scale(step, settings.optim, settings.train.steps)
    table_lr = scale * settings.optim.lr * settings.engram.lr_multiplier
    run.set_mode(training=True)
    loss = torch.zeros((), dtype=torch.float64, device=run.mesh.device)
    rows_grad = table.new_gradient(plan) if table is not None and plan is not None else None
    groups = by_exchange(batch, plan, run.mesh.device)

    for number, (exchange, micro_batches) in enumerate(groups, 1):
        if table is not None and plan is not None and exchange is not None:
            with clock.phase("fetch"):
                table.fetch(plan, exchange)
                table.fetch_ahead(plan, number, next_plan, table_lr)
        loss += run.schedule.step(micro_batches, number == len(groups), clock.phase)  # forward and backward
        if table is not None and exchange is not None and rows_grad is not None:
            with clock.phase("push"):
                table.push(exchange, rows_grad)

    with clock.phase("reduce"):
        if table is not None and rows_grad is not None:
            table.exchange.reduce_replicas(rows_grad)
        loss /= run.mesh.layout.tp  # its ranks have the same losses
        sums = _sum_up(run, loss, *asked())
        read = read_at_once({**sums, "squares": run.engine.squares(rows_grad)})
        norm, table_norm = norms_of(read.pop("squares"))
        (total,), (stopping,), (saving,) = (read.pop(name) for name in ("loss", "stop", "save"))
        run.engine.clip(rows_grad, norm, settings.optim.clip_norm)
    totals = Totals(total, read, stopping > 0, saving > 0, norm, table_norm, kept=accepts(total, norm))

    if totals.kept:
        with clock.phase("optimizer"):
            if before_update is not None:
                before_update()
            set_learning_rates(run.engine.optimizers, scale)
            run.engine.step()
            if table is not None and plan is not None and rows_grad is not None:
                table.update(plan, rows_grad, table_lr)
            for stage in stages:
                apply_router_statistics(stage, sums)
    run.engine.clear_gradients()
    return totals


def _sum_up(run: Run, loss: Tensor, stop: bool, save: bool) -> dict[str, Tensor]:
    """The step's loss, whether any rank was asked to stop or save, and the model's statistics, over all
    ranks; on the device.
    """
    device = (
        run.mesh.device
    )  # to bring a number there from the host would wait for all that the device has to do
    sums = {
        "loss": loss,
        "stop": torch.full((), float(stop), device=device),
        "save": torch.full((), float(save), device=device),
    }
    sums |= no_statistics(run.settings, device)
    for stage in run.model_parts:
        sums |= collect(stage)
        reset(stage)
    return reduce_sums(sums, run.mesh.world)


def read_at_once(values: dict[str, Tensor]) -> dict[str, list[float]]:
    """Every tensor's elements as numbers; the host waits for the device once, not once a tensor."""
    numbers = iter(torch.cat([value.flatten() for value in values.values()]).tolist())
    return {name: list(islice(numbers, value.numel())) for name, value in values.items()}


def reduce_sums(sums: dict[str, Tensor], group: Group) -> dict[str, Tensor]:
    """Sum every named tensor over the group's ranks, all in one collective, in float64."""
    device = next(iter(sums.values())).device
    flat = torch.cat([value.detach().to(device, torch.float64).flatten() for value in sums.values()])
    all_reduce_(flat, group)
    parts = flat.split([value.numel() for value in sums.values()])
    return {name: part.view(value.shape) for (name, value), part in zip(sums.items(), parts, strict=True)}
