"""Checkpoints: torch's distributed format under a commit protocol. A folder without `checkpoint.json` was never finished.

A save writes into a staging folder, every rank its own part; when all succeeded, rank 0 adds `checkpoint.json`, renames
the folder and only then moves `latest`. What fails on the way leaves the last good checkpoint as it was.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader

from hybridtrain import __version__
from hybridtrain.assemble import Parts
from hybridtrain.data.manifest import sync_folder, write_atomically
from hybridtrain.errors import CheckpointError
from hybridtrain.memory import TableMemory
from hybridtrain.parallel.collectives import Group, gather_objects
from hybridtrain.settings import Settings
from hybridtrain.stale import PREFIX, names_for

FORMAT = 1
INFO = "checkpoint.json"
METADATA = ".metadata"  # torch's index of the tensors


def save(parts: Parts, folder: Path, step: int, tokenizer_digest: str) -> Path:
    """Write the checkpoint after `step` steps under `folder` and make it the latest; returns its folder.

    Raises CheckpointError on every rank when any rank could not write; nothing that was committed is touched.
    """
    final, staging = folder / f"step-{step:08d}", folder / f".step-{step:08d}.partial"
    world = parts.mesh.world

    def make_staging() -> None:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)

    def commit() -> None:
        write_atomically(staging / INFO, json.dumps(_describe(parts, step, tokenizer_digest), indent=1).encode())
        commit_folder(staging, final)

    problems = _together(world, make_staging if world.rank == 0 else None)
    problems = problems or _together(world, lambda: _write(_whole_state(parts), staging, world))
    problems = problems or _together(world, commit if world.rank == 0 else None)
    if problems:
        free = shutil.disk_usage(folder if folder.exists() else folder.parent).free // 2**20
        if world.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise CheckpointError(
            f"{final}: the checkpoint of step {step} could not be written ({free} MiB free); the last good one stays: "
            + f"{latest(folder) or 'none'}\n"
            + "\n".join(f"  {p}" for p in problems)
        )
    if world.rank == 0:
        _prune(folder, parts.settings.checkpoint.keep)
    return final


def load(parts: Parts, path: Path) -> int:
    """Fill the run's parts from the checkpoint folder `path`, at whatever layout it was written; returns its step."""
    info = read_info(path)
    if not (path / METADATA).is_file():
        raise CheckpointError(f"{path}: damaged: {METADATA} is missing")
    weights_only = bool(info.get("weights_only"))
    if not weights_only:
        parts.engine.allocate_state()
    for stage in range(len(parts.stages)):  # as many on every rank
        state = _state(parts, stage)
        if weights_only:
            state = {name: value for name, value in state.items() if name.startswith("model.") or name == "memory.table"}
        read_into(state, path, parts.mesh.world)
        parts.engine.load_state(stage, state)
    if parts.memory is not None and not weights_only:
        parts.memory.load_scalars(info["memory_scalars"])
        if parts.settings.memory.fetch == "stale":
            _load_stale(parts.memory, path, no_dist=parts.mesh.world.size == 1)
    if "guard" in info:
        parts.guard.load_state(info["guard"])
    return int(info["step"])


def read_into(state: dict[str, Any], path: Path, world: Group) -> None:
    """Fill the tensors of `state` from the checkpoint folder `path`, DTensors with their own part; collective.

    Raises CheckpointError where the checkpoint is damaged or lacks one.
    """
    try:
        with _quiet():
            state_dict_loader.load(state, checkpoint_id=path, no_dist=world.size == 1)
    except (Exception, CheckpointException) as error:
        problems = [f"  {p}" for p in _problems(error, world.rank)]
        raise CheckpointError("\n".join([f"{path}: damaged or not of this model", *problems])) from None


def latest(folder: Path) -> Path | None:
    """The last committed checkpoint under `folder`, or None."""
    try:
        path = folder / (folder / "latest").read_text().strip()
    except OSError:
        return None
    return path if (path / INFO).is_file() else None


def read_info(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: step, settings, addressing, tokenizer digest.

    Raises CheckpointError where `path` is no finished checkpoint.
    """
    try:
        info: dict[str, Any] = json.loads((path / INFO).read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(f"{path} is no finished checkpoint: it has no {INFO}") from None
    except ValueError as error:
        raise CheckpointError(f"{path / INFO} is damaged: {error}") from None
    if info.get("format") != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {info.get('format')}; this version reads format {FORMAT}")
    return info


def check_fits(path: Path, settings: Settings, vocab_size: int, tokenizer_digest: str, addressing: str | None) -> None:
    """Raise CheckpointError listing every way in which the checkpoint at `path` is one of another model."""
    info = read_info(path)
    if info.get("weights_only"):
        raise CheckpointError(
            f"{path} holds imported weights and no optimizer state; "
            f"start a new run from it with train.init_from={path.parent.parent}"
        )
    problems = [
        f"{key}: the checkpoint has {json.dumps(theirs)}, the settings say {json.dumps(ours)}"
        for key, ours, theirs in _differences(identity(settings), info["identity"])
    ]
    if info["vocab_size"] != vocab_size:
        problems.append(f"vocabulary: the checkpoint has {info['vocab_size']} tokens, the data {vocab_size}")
    elif info["tokenizer_digest"] != tokenizer_digest:
        problems.append(f"tokenizer: the checkpoint was trained with {info['tokenizer_digest']}, the data has {tokenizer_digest}")
    elif info["addressing"] != addressing and not problems:
        problems.append("memory: the checkpoint's multipliers, primes or compression map are others")
    if problems:
        raise CheckpointError("\n".join([f"{path} is a checkpoint of another model", *(f"  {p}" for p in problems)]))


def identity(settings: Settings) -> dict[str, Any]:
    """The settings that say what the model and its optimizer state are, flat; a checkpoint fits where they are equal."""
    memory = {
        "enabled",
        "orders",
        "heads",
        "head_dim",
        "rows_per_head",
        "boundary",
        "conv",
        "conv_kernel",
        "gate_floor",
        "optimizer",
    }
    rates = ("bias_rate", "aux_weight", "z_weight")
    tree = {
        "model": settings.model.model_dump(mode="json", exclude={"init_std": True, "vocab_size": True, "moe": set(rates)}),
        "memory": settings.memory.model_dump(mode="json", include=memory),
        "optim": {"backbone": settings.optim.backbone},
    }
    return dict(_flatten(tree))


def _describe(parts: Parts, step: int, tokenizer_digest: str) -> dict[str, Any]:
    memory = parts.memory
    return {
        "format": FORMAT,
        "step": step,
        "guard": parts.guard.state(),
        "sequences": (step + parts.guard.passed_over) * parts.settings.train.global_batch,
        "version": __version__,
        "torch": torch.__version__,
        "layout": parts.mesh.layout.describe(),
        "identity": identity(parts.settings),
        "vocab_size": parts.vocabulary.size,
        "separator_id": parts.vocabulary.separator_id,
        "tokenizer_digest": tokenizer_digest,
        "addressing": memory.addressing.to_json() if memory is not None else None,
        "memory_scalars": memory.scalars() if memory is not None else None,
        "settings": parts.settings.model_dump(mode="json"),
    }


def _whole_state(parts: Parts) -> dict[str, Any]:
    """All that this rank saves. Of a parameter that two stages hold the first stage's is saved."""
    state: dict[str, Any] = {}
    for stage in range(len(parts.stages)):
        state |= _state(parts, stage, with_copies=False)
    return state


def _state(parts: Parts, stage: int, with_copies: bool = True) -> dict[str, Any]:
    """Every tensor of one of this rank's stages by its name in the whole model, from the engine and the memory.

    The memory goes with the rank's first stage.
    """
    state: dict[str, Any] = {**parts.engine.state(stage, with_copies)}
    if parts.memory is not None and stage == 0:
        state |= {f"memory.{name}": value for name, value in parts.memory.state().items()}
    return state


def _load_stale(memory: TableMemory, path: Path, no_dist: bool) -> None:
    """The rows that the run had read ahead, where the checkpoint has any: this owner's, out of whatever pieces they lie in."""
    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    section = "memory."
    names = [name.removeprefix(section) for name in metadata if name.startswith(section + PREFIX)]
    if not names:
        return
    state: dict[str, Any] = {}
    for name in names_for(names, memory.low, memory.high):
        entry: Any = metadata[section + name]
        state[section + name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    with _quiet():
        state_dict_loader.load(state, checkpoint_id=path, no_dist=no_dist)
    memory.load_stale({name.removeprefix(section): value for name, value in state.items()})


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that a world of one rank is meant to be one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _write(state: dict[str, Any], staging: Path, world: Group) -> None:
    with _quiet():
        state_dict_saver.save(state, checkpoint_id=staging, no_dist=world.size == 1)


def _together(world: Group, act: Callable[[], object] | None) -> list[str]:
    """Let this rank act, then tell all ranks what went wrong anywhere, so that they go on together."""
    problems: list[str] = []
    try:
        if act is not None:
            act()
    except (Exception, CheckpointException) as error:  # whatever a disk or torch can raise
        problems = _problems(error, world.rank)
    return list(dict.fromkeys(p for of_rank in gather_objects(problems, world) for p in of_rank))


def _problems(error: BaseException, rank: int) -> list[str]:
    """One line for each rank that failed: torch raises what failed anywhere on all ranks, as one BaseException."""
    failures = {r: e for r, (e, _) in error.failures.items()} if isinstance(error, CheckpointException) else {rank: error}
    return [f"rank {r}: {type(e).__name__}: {e}".splitlines()[0] for r, e in failures.items()]


def commit_folder(staging: Path, final: Path) -> None:
    """Give a finished staging folder its name and make it the latest checkpoint."""
    if final.exists():
        shutil.rmtree(final)  # a run that was resumed from before this step writes it anew
    os.rename(staging, final)
    sync_folder(final.parent)
    write_atomically(final.parent / "latest", final.name.encode())


def _prune(folder: Path, keep: int) -> None:
    for old in sorted(folder.glob("step-*"))[:-keep]:
        if old != latest(folder):
            shutil.rmtree(old, ignore_errors=True)


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for key, value in tree.items():
        out += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return out


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = dict.fromkeys([*ours, *theirs])
    return [(key, ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)]
