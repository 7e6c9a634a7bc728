"""Saves beside the training, incremental tables and URLs: what is saved is what was there, and any layout
goes on from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hybridtrain import checkpoint
from hybridtrain.checkpoint import blocks, files
from hybridtrain.checkpoint.state import Content
from hybridtrain.data.batches import BatchLoader
from hybridtrain.errors import CheckpointError
from hybridtrain.monitor.metrics import Clock
from hybridtrain.parallel.collectives import barrier
from hybridtrain.run.assemble import Run
from hybridtrain.run.loop import train_step
from hybridtrain.settings.tree import Settings
from tests.ranks import run_on_ranks
from tests.training import build_here, ci_settings

# one layer of nine heads: an odd number of primes, so that owners have unequal parts; rows that owe decay
# change when read
TABLE = (
    'model.layers=["attention+dense", "engram+attention+moe"]',
    "engram.orders=[2, 3, 4]",
    "engram.heads=3",
    "engram.rows_per_head=211",
    "engram.weight_decay=0.1",
    "train.global_batch=8",
    "optim.warmup_steps=2",
)
TWO = ("parallel.ep=2", "parallel.mem=2")


def steps(
    built: tuple[Run, BatchLoader], first: int, last: int, before_update: Callable[[], None] | None = None
) -> list[float]:
    """The losses of steps `first` to `last-1`."""
    run, loader = built
    out = []
    for step in range(first, last):
        batch = loader.load(step)
        plan = run.table.plan(batch) if run.table is not None else None
        clock = Clock(run.mesh.device)
        out.append(train_step(run, step, batch.at(run.positions), plan, clock, None, before_update).loss)
    return out


def all_state(run: Run) -> dict[str, Tensor]:
    assert run.table is not None
    state = {**run.engine.state(0), **run.table.row_tensors()}
    return {
        name: (v.to_local() if hasattr(v, "to_local") else v).detach().clone() for name, v in state.items()
    }


def loaded(settings: Settings, path: Path) -> tuple[Run, BatchLoader]:
    run = build_here(settings)
    checkpoint.verify(path, "full", run[0].mesh.world)
    checkpoint.load(run[0], path)
    return run


@contextmanager
def slow_writes(seconds: float) -> Iterator[None]:
    """Nothing is copied of what is saved for so long, and then again nothing is written."""
    real = Content.hold, files.Writer.write_data

    def hold(self: Content) -> None:
        time.sleep(seconds)
        real[0](self)

    def write_data(self: Any, *rest: Any) -> Any:
        time.sleep(seconds)
        return real[1](self, *rest)

    Content.hold, files.Writer.write_data = hold, write_data  # type: ignore[method-assign]
    try:
        yield
    finally:
        Content.hold, files.Writer.write_data = real  # type: ignore[method-assign]


def saved_bytes(path: Path) -> dict[str, Any]:
    info = checkpoint.read_info(path)
    return {"files": info["files"], "table_scalars": info["table_scalars"]}


def save_in_every_way(settings: dict[str, Settings], folder: Path) -> dict[str, Any]:
    """On a rank: one run saved at once and in the background, whole and incremental; and what goes on from
    each.
    """
    if dist.get_world_size() == 1:
        dist.destroy_process_group()
    blocks.BLOCK_BYTES = 4096
    out: dict[str, Any] = {}
    undisturbed, beside, changes = (
        build_here(settings[name]) for name in ("plain", "background", "incremental")
    )
    savers = {
        name: checkpoint.Saver(run[0], folder / name, "digest")
        for name, run in (("plain", undisturbed), ("background", beside), ("incremental", changes))
    }
    losses = steps(undisturbed, 0, 3)
    assert losses == steps(beside, 0, 3)
    savers["plain"].save(3)
    with slow_writes(1.0):
        begin = time.perf_counter()
        savers["background"].save(3)
        out["blocked"] = time.perf_counter() - begin
        rest = steps(beside, 3, 6, savers["background"].before_update)
        out["not yet"] = checkpoint.latest(folder / "background")
        savers["background"].save(6)  # waits for the one before
        out["then"] = checkpoint.latest(folder / "background")
        savers["background"].finish()
    losses += steps(undisturbed, 3, 6)
    out["rest"] = rest == losses[3:]
    savers["plain"].save(6)
    out["same"] = [
        saved_bytes(folder / "background" / name) == saved_bytes(folder / "plain" / name)
        for name in ("step-00000003", "step-00000006")
    ]

    for done in (2, 4, 6):
        steps(changes, done - 2, done, savers["incremental"].before_update)
        savers["incremental"].save(done)
    savers["incremental"].finish()
    paths = {name: checkpoint.latest(folder / name) for name in ("plain", "incremental")}
    runs = {name: loaded(settings["plain"], path) for name, path in paths.items() if path is not None}
    out["loaded"] = equal(all_state(runs["plain"][0]), all_state(runs["incremental"][0]))
    out["losses"] = [steps(run, 6, 8) for run in (undisturbed, *runs.values())]
    out["ends"] = [equal(all_state(run[0]), all_state(undisturbed[0])) for run in runs.values()]
    return out


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """The names of those that differ in a bit."""
    assert ours.keys() == theirs.keys()
    return [name for name, value in ours.items() if not torch.equal(value, theirs[name])]


def settings_of(data: Path, *overrides: str) -> dict[str, Settings]:
    ways = {
        "plain": (),
        "background": ("checkpoint.background=true",),
        "incremental": ("checkpoint.background=true", "checkpoint.table_full_every=3"),
    }
    return {name: ci_settings(Path("unused"), data, *TABLE, *overrides, *more) for name, more in ways.items()}


def load_both(settings: Settings, folder: Path) -> tuple[list[str], list[int]]:
    """On a rank of another layout: what differs between the whole and the incremental checkpoint, and the
    owner's rows.
    """
    if dist.get_world_size() == 1:
        dist.destroy_process_group()
    plain, incremental = (
        loaded(settings, folder / name / "step-00000006")[0] for name in ("plain", "incremental")
    )
    assert plain.table is not None
    return equal(all_state(plain), all_state(incremental)), [plain.table.low, plain.table.high]


@pytest.mark.parametrize(
    "mem", [2, pytest.param(1, marks=pytest.mark.parity)], ids=["owners of unequal parts", "copies"]
)
def test_every_way_to_save_gives_the_same_bits_at_every_layout(
    ci_data: Path, tmp_path: Path, mem: int
) -> None:
    for out in run_on_ranks(
        save_in_every_way, 2, settings_of(ci_data, "parallel.ep=2", f"parallel.mem={mem}"), tmp_path
    ):
        assert out["rest"]
        assert out["same"] == [True, True]
        assert out["not yet"] is None
        assert out["then"] == tmp_path / "background/step-00000003"
        assert out["blocked"] < 0.9
        assert out["loaded"] == []
        assert out["losses"][1:] == out["losses"][:1] * 2
        assert out["ends"] == [[], []]
    info = checkpoint.read_info(tmp_path / "incremental/step-00000006")
    base = checkpoint.read_info(tmp_path / "incremental/step-00000002")
    assert info["base"] == {"name": "step-00000002", "xxh3": base["xxh3"], "age": 2}
    names = set(checkpoint.StoredTensors(tmp_path / "plain/step-00000006").shapes)
    plain, incremental = (
        checkpoint.StoredTensors(tmp_path / name / "step-00000006") for name in ("plain", "incremental")
    )
    assert set(incremental.shapes) == names
    for name in names:
        assert torch.equal(plain.read(name), incremental.read(name)), name
    rows = plain.shapes["table.rows"][0]
    assert rows % 2 == 1
    for low, high in ((0, 1), (rows // 2 - 5, rows // 2 + 5), (rows - 1, rows), (3, 3)):
        assert torch.equal(incremental.read("table.rows", low, high), plain.read("table.rows", low, high))
    others = {1: (), 2: ("parallel.ep=1", f"parallel.mem={3 - mem}")}
    found = {
        n: run_on_ranks(load_both, n, settings_of(ci_data, *more)["plain"], tmp_path)
        for n, more in others.items()
    }
    half = -(-rows // 2)
    assert found == {
        1: [([], [0, rows])],
        2: [([], [0, half]), ([], [half, rows])] if mem == 1 else [([], [0, rows])] * 2,
    }


def at_urls(settings: dict[str, Settings], where: str) -> list[Any]:
    """On a rank: incremental saves in the background to a URL, and what is loaded from there."""
    if dist.get_world_size() == 1:
        dist.destroy_process_group()
    run = build_here(settings["incremental"])
    folder = checkpoint.open_storage(where)
    saver = checkpoint.Saver(run[0], folder, "digest")
    for done in range(1, 6):
        steps(run, done - 1, done, saver.before_update)
        saver.save(done)
    saver.finish()
    barrier(run[0].mesh.world)  # rank 0 has removed what need not be kept
    found = [path.name for path in checkpoint.candidates(folder)]
    path = checkpoint.latest(folder)
    assert path is not None
    again = loaded(settings["plain"], path)
    differ = equal(all_state(run[0]), all_state(again[0]))
    stored = checkpoint.StoredTensors(path)
    assert again[0].table is not None
    low, high = again[0].table.low, again[0].table.high
    same = torch.equal(stored.read("table.rows", low, high), again[0].table.table)
    world = run[0].mesh.world
    barrier(world)
    if world.rank == 0:
        content = bytearray((path / "__0_0.distcp").read_bytes())
        content[len(content) // 2] ^= 1
        (path / "__0_0.distcp").write_bytes(bytes(content))
    barrier(world)
    with pytest.raises(
        CheckpointError,
        match=r"__0_0\.distcp: is damaged: it has [0-9]+ bytes with xxh3 [0-9a-f]{32}, must have",
    ):
        checkpoint.verify(path, "full", world)
    return [found, differ, same]


@pytest.mark.parametrize(("nproc", "where"), [(1, "memory://runs/one"), (2, "local://{}/two")])
def test_checkpoints_may_lie_at_any_url(ci_data: Path, tmp_path: Path, nproc: int, where: str) -> None:
    overrides = TWO if nproc == 2 else ()
    for found, differ, same in run_on_ranks(
        at_urls, nproc, settings_of(ci_data, *overrides), where.format(tmp_path)
    ):
        # 1 and 4 are whole; 5 and 4 are the last two
        assert found == ["step-00000005", "step-00000004"]
        assert differ == []
        assert same


def test_a_table_that_changes_as_a_whole_is_copied_before_it_does(ci_data: Path, tmp_path: Path) -> None:
    settings = ci_settings(
        Path("unused"), ci_data, *TABLE, "engram.optimizer=adam", "checkpoint.background=true"
    )
    run = build_here(settings)
    with checkpoint.Saver(run[0], tmp_path, "digest") as saver, slow_writes(0.5):
        steps(run, 0, 2)
        then = all_state(run[0])
        path = saver.save(2)
        steps(run, 2, 4, saver.before_update)
    now = all_state(run[0])
    stored = checkpoint.StoredTensors(path)
    for name in ("rows", "state.m", "state.v"):
        assert torch.equal(stored.read(f"table.{name}"), then[name])
        assert not torch.equal(now[name], then[name])
