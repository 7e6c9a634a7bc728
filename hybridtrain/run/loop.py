"""The training loop, and the run around it: `train` opens folder, data and ranks, `Loop` makes the steps."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hybridtrain import checkpoint
from hybridtrain.checkpoint import Consumed
from hybridtrain.console import say
from hybridtrain.data.batches import Batch, BatchLoader, BatchShare
from hybridtrain.data.prefetch import StepPrefetcher
from hybridtrain.data.shards import TokenDataset
from hybridtrain.errors import TrainingError
from hybridtrain.kernels.engram_hash.addressing import Addressing
from hybridtrain.model.registry import allowing
from hybridtrain.monitor.clock import Clock
from hybridtrain.monitor.loss_spikes import all_finite
from hybridtrain.monitor.metrics import MetricsLog
from hybridtrain.monitor.signals import StopSignal
from hybridtrain.monitor.watchdog import Watchdog
from hybridtrain.parallel.collectives import gather_objects
from hybridtrain.parallel.experts import DispatchMemoryError
from hybridtrain.parallel.mesh import Mesh, close_mesh
from hybridtrain.parallel.row_exchange import StepPlan
from hybridtrain.run.assemble import Run, assemble, make_addressing
from hybridtrain.run.init_from import start_from
from hybridtrain.run.memory import check_memory, device_bytes
from hybridtrain.run.nonfinite import name_source_of_nonfinite
from hybridtrain.run.pause import Pause
from hybridtrain.run.process_setup import compute_dtype, join_world
from hybridtrain.run.report import Report
from hybridtrain.run.resume import Continuation, Reading
from hybridtrain.run.run_folder import RunFolder, RunLocks
from hybridtrain.run.step import Hooks, StepInput, Totals, train_step
from hybridtrain.run.validation import evaluate
from hybridtrain.run.writable import check_folders, unusable_folders
from hybridtrain.settings.tree import Settings, SpikeAction

DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE),
    # of what another user left in the folder, or by hand:
    *(errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR),
)
Planned = tuple[Batch, StepPlan | None]
Info = dict[str, Any]  # what a checkpoint says of itself


def train(settings: Settings, resume: bool | None = False, allow: Collection[str] = ()) -> dict[str, Any]:
    """Run `settings.train.steps` steps, or with `resume` the rest of them; returns the summary that rank 0
    writes.

    `resume` None: the rest where the run folder has a checkpoint, else all. `allow`: what of resume.ALLOWABLE
    may differ from the checkpoint's. Raises UserError or LayoutError for what the user can mend.

    The checkpoints that it reads may name the components of `settings`, on every rank.
    """
    with allowing(settings.model.components):
        return _train(settings, resume, allow)


def _train(settings: Settings, resume: bool | None, allow: Collection[str]) -> dict[str, Any]:
    mesh, locks = join_world(settings), None
    try:
        check_folders(settings, gather_objects(unusable_folders(settings), mesh.world))
        locks = RunLocks(settings, mesh.world)
        locks.take()
        if resume is None:
            resume = any(gather_objects(RunFolder.of(settings, mesh.world).has_checkpoint, mesh.world))
        folder = RunFolder.open(settings, mesh.world, resume)
        folder.confirm = locks.confirm
        opened = _open(settings, mesh, folder, resume, allow)
        stalls = folder.path / "stalls" / gather_objects(time.strftime("%Y%m%d-%H%M%S"), mesh.world)[0]
        with Watchdog(mesh.world, opened.clock, stalls, settings.parallel.timeout):
            return opened.train(opened.restore(opened.continuation.check) if resume else None)
    except DispatchMemoryError as error:
        raise TrainingError(str(error)) from error
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        last = checkpoint.latest(RunFolder.of(settings, mesh.world).checkpoints)
        where = f"{error.filename or settings.run.dir}: {error.strerror}"
        raise TrainingError(f"{where}; the last good checkpoint is {last or 'none'}") from error
    finally:
        if locks is not None:
            locks.release()
        close_mesh()


def _open(
    settings: Settings, mesh: Mesh, folder: RunFolder, resume: bool, allow: Collection[str]
) -> OpenedRun:
    """The run on this rank, with its data; its parameters are drawn, or those of `train.init_from`."""
    vocabulary, dataset = folder.prepare_data(settings)
    layout, dtype = mesh.layout, compute_dtype(settings, mesh.device)
    check_memory(settings, layout, vocabulary.size, dtype, device_bytes(mesh.device, layout.world))
    addressing = make_addressing(settings, vocabulary)
    run = assemble(settings, mesh, vocabulary, addressing)
    if settings.train.init_from and not resume:
        source = checkpoint.open_storage(settings.train.init_from, "train.init_from")
        start_from(run, source, folder.path, dataset.manifest)
    data = Continuation(settings, dataset, allow)
    return OpenedRun(run, folder, dataset, data, addressing, Clock(mesh.device))


@dataclass(frozen=True)
class OpenedRun:
    """A run with its folder and data, before its first step."""

    run: Run
    folder: RunFolder
    dataset: TokenDataset
    continuation: Continuation
    addressing: Addressing | None
    clock: Clock

    def restore(self, check: Callable[[Path, Info], None] = lambda *_: None) -> Info:
        """Load the latest good checkpoint and return its description. Ranks may stand still here, so it is
        timed as a phase of its own, outside of steps.
        """
        with self.clock.phase("restore"):
            info = self.folder.restore(self.run, self.addressing, check)
        self.clock.take()
        return info

    def train(self, before: Info | None) -> dict[str, Any]:
        """Train from the checkpoint with the description `before`, or from the start, to the end; returns the
        summary.
        """
        run, settings, mesh = self.run, self.run.settings, self.run.mesh
        start = before["step"] if before else 0
        self._say_what_changed(before)
        loader = self._loader(before, start)
        consumed = Consumed.of(before) if before else None
        reading = Reading(loader, run.guard, settings.run.seed, self.continuation.digests, consumed)
        log = MetricsLog(self.folder.path, mesh.rank, start, settings.train.steps, self.folder.confirm)
        report = Report(run, log, self.folder.path, self.clock, start, reading)

        def load(step: int) -> Planned:
            batch = loader.load(step)
            plan = run.table.plan(batch) if run.table is not None else None  # from tokens on the CPU
            return batch.at(run.positions), plan

        def validate(batches: int, go_on: Callable[[], bool]) -> dict[str, float]:
            return evaluate(run, self.dataset.split("validation"), batches, go_on)

        try:
            with (
                self.folder.saver(run, reading.describe) as saver,
                StepPrefetcher(load, settings.train.steps) as prefetcher,
                StopSignal() as signal,
            ):

                def restore() -> Info:
                    info = self.restore()
                    saver.base = self.folder.base
                    return info

                pause = Pause(run, saver, signal, report, validate)
                return Loop(run, pause, prefetcher, restore).train(start)
        finally:
            log.close()

    def _say_what_changed(self, before: Info | None) -> None:
        mesh = self.run.mesh
        if before is None or mesh.rank != 0:
            return
        if lines := self.continuation.told(self.folder.restored, before, mesh.layout.describe()):
            say("\n".join(lines))

    def _loader(self, before: Info | None, start: int) -> BatchLoader:
        train, layout = self.run.settings.train, self.run.mesh.layout
        dp_rank = layout.coordinate(self.run.mesh.rank, "dp")
        return BatchLoader(
            self.dataset.split("train"),
            train.seq_len,
            BatchShare(train.global_batch, train.micro_batches, dp_rank, layout.dp),
            self.run.settings.run.seed,
            self.continuation.position(before) if before else None,
            start + self.run.guard.skipped_batches,
        )


class _At(NamedTuple):
    """Where the loop stands: `done` steps are made, `step` comes next (None: none), or the run stops."""

    done: int
    step: Planned | None
    stop: bool


class Loop:
    """Makes the steps of a run and what comes between them; every rank makes the same calls in one order.

    prefetcher: loads and plans steps ahead in a thread
    restore: loads the latest good checkpoint and returns its description
    """

    def __init__(
        self, run: Run, pause: Pause, prefetcher: StepPrefetcher[Planned], restore: Callable[[], Info]
    ) -> None:
        self.run, self.pause, self.prefetcher, self.restore = run, pause, prefetcher, restore
        self.saver, self.report, self.signal = pause.saver, pause.report, pause.signal
        self.hooks = Hooks(self.report.clock.phase, self.saver.before_update, self._asked, run.guard.accepts)

    def train(self, start: int) -> dict[str, Any]:
        """From step `start` (from 0) to the last, or until a rank is asked to stop; returns the summary."""
        steps, report = self.run.settings.train.steps, self.report
        if start > steps or (start == steps and gather_objects(report.ended(), self.run.mesh.world)[0]):
            return report.nothing_left(start)
        report.header()
        if start == steps:  # it was cut off in its last validation
            report.recall()
        at = self._begin(start)
        while at.step is not None:
            at = self._advance(at.done, at.step)
        self.saver.finish()
        if at.stop:
            self.prefetcher.finish()  # ranks may have planned ahead by different numbers of steps
            return report.stopped(at.done, self.signal.name)
        return report.finish(steps)

    def _begin(self, done: int) -> _At:
        """After the start or a restore, behind `done` steps: nothing was done ahead but what a checkpoint
        holds.
        """
        if self.pause.validates(done) and self.pause.validation(done, again=True):
            return _At(done, None, stop=True)
        if done == self.run.settings.train.steps:
            return _At(done, None, stop=False)
        with self.report.clock.phase("data"):
            first = self.prefetcher.begin(done, self.run.guard.skipped_batches)
        if self.run.table is not None:
            self.run.table.resume(first[1])
        return _At(done, first, stop=False)

    def _advance(self, number: int, step: Planned) -> _At:
        """Make step `number` (from 0) and what is due after it."""
        batch, plan = step
        done = self.report.clock.step = number + 1
        upcoming = None
        with self.report.clock.phase("data"):
            if done < self.run.settings.train.steps:
                upcoming = self.prefetcher.get(done)
        data = StepInput(batch, plan, upcoming[1] if upcoming is not None else None)
        totals = train_step(self.run, number, data, self.hooks)
        if totals.kept:
            self.run.guard.took(done, totals.loss)
            self.report.reading.took(number)
            self.report.step(done, totals, plan)
        elif self._refuse(done, data, totals) == "rollback":
            return self._begin(self._roll_back(done))
        stop = self.pause.after(done, totals.stop, totals.save)
        return _At(done, None if stop else upcoming, stop)

    def _asked(self) -> tuple[bool, bool]:
        return self.signal.received or self.saver.failed, self.signal.save

    def _refuse(self, done: int, data: StepInput, totals: Totals) -> SpikeAction:
        """What `train.on_spike` says to do about a step that was not made: skip it or roll back; raises
        TrainingError to stop.
        """
        run, train, action = self.run, self.run.settings.train, self.run.settings.train.on_spike
        self.saver.finish()
        last = checkpoint.latest(self.saver.folder)
        what = run.guard.describe(totals.loss, totals.grad_norm)
        allowed = run.guard.refuse(done)
        nowhere_to_go = action == "rollback" and last is None
        if action == "stop" or not allowed or nowhere_to_go:
            if not all_finite(totals.loss, totals.grad_norm):
                what += f"; {name_source_of_nonfinite(run, data.batch, data.plan)}"
            if not allowed:
                what += f"; that is more than train.spike_limit={train.spike_limit} in a row"
            raise TrainingError(
                f"step {done}: {what}. The last good checkpoint is {last or 'none'}; nothing of this step "
                "was kept"
            )
        if run.table is not None and (action == "rollback" or run.table.mode == "overlap"):
            run.table.forget_ahead()  # rows as they would be after the update
        self.report.refused(done, what, action, totals.loss)
        return action

    def _roll_back(self, done: int) -> int:
        """Load the latest checkpoint; returns the number of its step. The data of the refused step and of
        those before it are not read again.
        """
        data = done + self.run.guard.skipped_batches
        info = self.restore()
        self.report.reading.tokens = Consumed.of(info).tokens
        step = int(info["step"])
        self.run.guard.skipped_batches = data - step
        self.report.rolled_back(step)
        return step
