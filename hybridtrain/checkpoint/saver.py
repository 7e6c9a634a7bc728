"""Saves a run's checkpoints, one at a time, beside the training where `checkpoint.background` says so.

A save writes into a staging folder, every rank its own part; when all succeeded, rank 0 adds
`checkpoint.json`, renames the folder and only then moves `latest`. A failure on the way leaves the last good
checkpoint as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch.distributed.checkpoint import state_dict_saver

from hybridtrain.checkpoint.all_or_none import Failures, all_or_none, on_first
from hybridtrain.checkpoint.blocks import BlockPlanner
from hybridtrain.checkpoint.files import Records, Writer, quiet
from hybridtrain.checkpoint.history import begin_folder, commit_folder, folder_of, latest, prune, staging_of
from hybridtrain.checkpoint.info import describe
from hybridtrain.checkpoint.saved import Saved
from hybridtrain.checkpoint.state import Content, content, release
from hybridtrain.checkpoint.storage import flush_folder, free_space, remove_folder
from hybridtrain.errors import CheckpointError
from hybridtrain.files.lock import LockLost
from hybridtrain.parallel.collectives import Group

if TYPE_CHECKING:
    from hybridtrain.run.assemble import Run

PATIENCE = 6
"""Times `parallel.timeout` that ranks wait for the slowest disk among them; a rank that died is noticed at
once.
"""


@dataclass(frozen=True)
class Base:
    """The last checkpoint with a whole table."""

    name: str
    xxh3: str  # of its checkpoint.json
    updates: int  # of the table when it was saved
    age: int = 0  # incremental checkpoints based on it

    @classmethod
    def of(cls, where: Path | Saved) -> Base | None:
        """What a run that goes on from the checkpoint `where` bases its incremental checkpoints on; None
        without a table.
        """
        saved = Saved.of(where)
        age = saved.info["base"]["age"] if saved.base is not None else 0
        base = saved.base or saved
        scalars = base.info["table_scalars"]
        return cls(base.path.name, base.info["xxh3"], scalars["step_count"], age) if scalars else None


class Saver:
    """Saves the run's parts under `folder`; every method is called by all ranks at the same step.

    Leaving its context waits for a save that is under way. `reading(step)` returns what `checkpoint.json`
    also says about the data.
    """

    def __init__(
        self,
        run: Run,
        folder: Path,
        tokenizer_digest: str,
        base: Base | None = None,
        reading: Callable[[int], dict[str, Any]] = lambda step: {},
        confirm: Callable[[bool], None] = lambda at_once: None,
    ) -> None:
        """`confirm` is called by rank 0 before a save begins and before it is committed; raises LockLost
        where the folder is another run's now."""
        self.run, self.folder, self.tokenizer_digest, self._confirm = run, folder, tokenizer_digest, confirm
        self.base, self.reading = base, reading
        self._world: Group = run.mesh.own_world_group("checkpoint", PATIENCE * run.mesh.timeout)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._held = threading.Event()
        self._held.set()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        elif self._thread is not None:
            self._thread.join(self.run.mesh.timeout)  # the run's own error is raised, not this save's

    @property
    def failed(self) -> bool:
        """Whether the save under way failed here, or another run has taken the folder; the next save raises
        that on every rank.
        """
        try:
            self._confirm(False)
        except LockLost:
            return True
        return self._error is not None

    def save(self, step: int, wait: bool = False) -> Path:
        """Save the run as it is after `step` steps; returns the checkpoint's folder. In the background it is
        finished later.

        One that is under way is waited for before, and with `wait` this one is as well. Raises
        CheckpointError on every rank where any could not write; nothing that was committed is touched.
        """
        self.finish()
        settings, final = self.run.settings.checkpoint, folder_of(self.folder, step)
        info = describe(self.run, step, self.tokenizer_digest) | self.reading(step)
        base = self.base
        if base is not None and (base.age + 1 >= settings.table_full_every or base.name == final.name):
            base = None
        if base is not None:
            base = replace(base, age=base.age + 1)
            info["base"] = {"name": base.name, "xxh3": base.xxh3, "age": base.age}
        what = content(self.run, base.updates if base is not None else None, later=settings.background)
        work = partial(self._save, final, step, what, info, base)
        if settings.background:
            self._held.clear()
            self._thread = threading.Thread(target=self._catch, args=(work,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            work()
        if wait:
            self.finish()
        return final

    def before_update(self) -> None:
        """Wait until parameters and optimizer state, which the coming update changes, are copied for the save
        under way.
        """
        self._held.wait()

    def finish(self) -> None:
        """Wait for the save under way. Raises CheckpointError, as `save` does, where it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _catch(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error

    def _save(self, final: Path, step: int, what: Content, info: dict[str, Any], base: Base | None) -> None:
        world, settings, staging = self._world, self.run.settings.checkpoint, staging_of(final)
        try:
            if settings.background:
                all_or_none(world, self._holding(what))
            on_first(world, partial(self._begin, staging))
            records = all_or_none(world, partial(_write, what, staging, world))
            info |= {"files": {name: record for theirs in records for name, record in theirs.items()}}
            xxh3 = on_first(world, partial(self._commit, staging, final, info))
        except Failures as failures:
            last = latest(self.folder)
            message = (
                f"{final}: the checkpoint of step {step} could not be written{free_space(self.folder)}; the "
                "last good one stays: "
                + "\n".join([str(last or "none"), *(f"  {p}" for p in failures.problems)])
            )
            if world.rank == 0:
                with suppress(LockLost):  # then another run may write there by now
                    self._confirm(True)
                    remove_folder(staging)
            raise CheckpointError(message) from None
        finally:
            self._held.set()
            release(self.run)
        table = self.run.table
        if table is not None:
            self.base = base or Base(final.name, xxh3, info["table_scalars"]["step_count"])
        if world.rank == 0:
            with suppress(OSError):  # what cannot be removed now is removed after another save
                prune(self.folder, step, settings.keep_last, settings.keep_every)

    def _begin(self, staging: Path) -> None:
        self._confirm(True)
        begin_folder(staging)

    def _commit(self, staging: Path, final: Path, info: dict[str, Any]) -> str:
        self._confirm(True)
        return commit_folder(staging, final, info)

    def _holding(self, what: Content) -> Callable[[], None]:
        def hold() -> None:
            try:
                what.hold()
            finally:
                self._held.set()

        return hold


def _write(what: Content, staging: Path, world: Group) -> Records:
    writer = Writer(staging, world.traffic.alive)
    with quiet():
        state_dict_saver.save(
            cast(dict[str, Any], what.state),
            storage_writer=writer,
            planner=BlockPlanner(what.sources),
            process_group=world.process_group,
            no_dist=world.size == 1,
        )
    flush_folder(staging)
    return writer.records
