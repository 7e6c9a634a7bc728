"""Verifies a checkpoint and fills a run's parts from it, at whatever layout it was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException

from hybridtrain.checkpoint.all_or_none import Failures, all_or_none, describe_failures
from hybridtrain.checkpoint.blocks import BLOCK_BYTES
from hybridtrain.checkpoint.damage import damage
from hybridtrain.checkpoint.files import Reader, quiet
from hybridtrain.checkpoint.info import row_scalars
from hybridtrain.checkpoint.saved import Saved
from hybridtrain.checkpoint.stored import TABLE, StoredTensors
from hybridtrain.errors import DamagedCheckpoint
from hybridtrain.parallel.collectives import Group
from hybridtrain.settings.tree import VerifyLevel
from hybridtrain.table.lookup_table import LookupTable
from hybridtrain.table.saved_rows import KIND, SavedRows

if TYPE_CHECKING:
    from hybridtrain.run.assemble import Run

ALONE = Group("world", (0,), 0)
_PART_BYTES = 8 * BLOCK_BYTES  # of rows that are read at once


def load(run: Run, where: Path | Saved) -> int:
    """Fill the run's parts from the checkpoint `where`, at whatever layout it was written; returns its
    step.

    Call `verify` before. Raises DamagedCheckpoint on every rank where any cannot read it; the parts are then
    worth nothing.
    """
    world = run.mesh.world
    saved = Saved.of(where)
    path, info = saved.path, saved.info
    weights_only = bool(info.get("weights_only"))
    if not weights_only:
        run.engine.allocate_state()
    for stage in range(len(run.model_parts)):  # as many on every rank
        state = run.engine.state(stage)
        if weights_only:
            state = {name: value for name, value in state.items() if name.startswith("model.")}
        read_into(state, saved, world)
        run.engine.load_state(stage, state)
    table = run.table
    if table is not None:
        try:
            all_or_none(
                world, lambda: _load_rows(table, StoredTensors(saved), weights_only, world.traffic.alive)
            )
        except Failures as failures:
            raise DamagedCheckpoint(
                "\n".join([f"{path}: its table cannot be read", *_lines(failures.problems)])
            ) from None
        if not weights_only:
            _load_scalars(table, row_scalars(info), path, world)
    if "guard" in info:  # imported weights have none
        run.guard.load_state(info["guard"])
    return int(info["step"])


def _load_scalars(table: LookupTable, scalars: dict[str, Any] | None, path: Path, world: Group) -> None:
    if scalars is None:
        raise DamagedCheckpoint(f"{path}: damaged: it has no table_scalars, and its table is trained")
    try:
        all_or_none(world, lambda: table.load_scalars(scalars))
    except Failures as failures:
        raise DamagedCheckpoint(
            "\n".join([f"{path}: training cannot go on with its table", *_lines(failures.problems)])
        ) from None


def verify(where: Path | Saved, level: VerifyLevel, world: Group = ALONE) -> None:
    """Raise DamagedCheckpoint listing every file of the checkpoint, or of its base, that has changed.

    Collective: each rank looks at its share of the files. `level` is that of `damage`.
    """
    saved = Saved.of(where)
    try:
        found = all_or_none(world, lambda: damage(saved, level, world.rank, world.size, world.traffic.alive))
    except Failures as failures:
        found = [failures.problems]
    if problems := list(dict.fromkeys(p for theirs in found for p in theirs)):
        raise DamagedCheckpoint("\n".join([f"{saved.path} cannot be used", *_lines(problems)]))


def read_into(state: dict[str, Any], where: Path | Saved, world: Group) -> None:
    """Fill the tensors of `state` from the checkpoint `where`, DTensors with their own part;
    collective.

    Raises DamagedCheckpoint where the checkpoint is damaged or lacks one.
    """
    saved = Saved.of(where)
    path = saved.path

    def look() -> None:  # before torch's collectives
        _ = saved.index

    try:
        all_or_none(world, look)
    except Failures as failures:
        raise DamagedCheckpoint(
            "\n".join([f"{path}: damaged or not of this model", *_lines(failures.problems)])
        ) from None
    try:
        with quiet():
            state_dict_loader.load(
                state, storage_reader=Reader(path, saved.index, world.traffic.alive), no_dist=world.size == 1
            )
    except (Exception, CheckpointException) as error:
        problems = describe_failures(error, world.rank)
        raise DamagedCheckpoint(
            "\n".join([f"{path}: damaged or not of this model", *_lines(problems)])
        ) from None


def _load_rows(
    table: LookupTable, stored: StoredTensors, weights_only: bool, alive: Callable[[], None]
) -> None:
    """This owner's rows, out of whatever chunks they lie in; `alive` is called for every part of them."""
    for name, value in table.row_tensors().items():
        if name == "rows" or not weights_only:
            count = max(1, _PART_BYTES * len(value) // max(1, value.nbytes))
            for low in range(0, len(value), count):
                stored.read_into(value[low : low + count], f"{TABLE}{name}", table.low + low)
                alive()
    if table.mode == "stale" and not weights_only:
        chunks = stored.row_chunks(f"{TABLE}{KIND}", table.low, table.high)
        table.load_saved_rows(
            [SavedRows(stored.read(f"{chunk}.numbers"), stored.read(f"{chunk}.values")) for chunk in chunks]
        )


def _lines(problems: list[str]) -> list[str]:
    return [f"  {problem}" for problem in problems]
