"""Layouts between which checkpoints of configs/ci.toml are carried, and the step after a load."""

from __future__ import annotations

from pathlib import Path

import torch

from hybridtrain import checkpoint
from hybridtrain.checkpoint import StoredTensors
from hybridtrain.monitor.clock import Clock
from hybridtrain.parallel.mesh import close_mesh
from hybridtrain.reshard import digest_stored
from hybridtrain.run.step import Hooks, StepInput, train_step
from hybridtrain.settings.load import load_settings
from tests.training import build_here

AXES = ("pp", "dp_replicate", "cp", "tp", "ep", "etp", "mem")

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ()),
    "tp 2": (2, ("tp=2", "zero=3")),
    "ep 2 · mem 2": (2, ("ep=2", "mem=2", "zero=0")),
    "pp 2, cut 3 1 · mem 1": (2, ("pp=2", "stage_cuts=[3,1]", "mem=1")),
    "cp 2": (2, ("cp=2",)),
    "tp 2 · ep 4": (4, ("tp=2", "ep=4", "zero=3")),
    "tp 2 · etp 2 · ep 2": (4, ("tp=2", "etp=2", "ep=2")),
    "pp 2 · interleaved": (4, ("pp=2", "schedule=interleaved", "ep=2", "mem=4")),
    "replicas · mem 2 far": (4, ("dp_replicate=2", "ep=2", "mem=2", "mem_placement=strided", "zero=3")),
    "pp 2 · replicas · ep 2 · mem 8": (8, ("pp=2", "dp_replicate=2", "ep=2", "mem=8", "zero=0")),
    "dp 8 · ep 4 · mem 8": (8, ("ep=4", "mem=8")),
    "pp 4 · tp 2 · mem 4": (8, ("pp=4", "tp=2", "mem=4")),
}
"""The table has a prime number of rows a head, so that 2, 4 and 8 owners have parts of different sizes."""


def overrides(name: str) -> list[str]:
    """All axes, so that none stays from the layout before."""
    chosen = LAYOUTS[name][1]
    defaults = [f"parallel.{axis}=1" for axis in AXES[:-1]]
    rest = [
        "parallel.mem=-1",
        "parallel.zero=1",
        "parallel.schedule=1f1b",
        "parallel.stage_cuts=[]",
        "parallel.mem_placement=contiguous",
    ]
    stages = next((int(o.partition("=")[2]) for o in chosen if o.startswith("pp=")), 1)
    return [
        *defaults,
        *rest,
        *(f"parallel.{override}" for override in chosen),
        f"train.micro_batches={stages}",
    ]


def latest(run: Path) -> Path:
    path = checkpoint.latest(run / "checkpoints")
    assert path is not None
    return path


def digests(run: Path) -> dict[str, str]:
    """Of every logical tensor of a run's latest checkpoint, as it is read from the files."""
    stored = StoredTensors(latest(run))
    return {name: digest_stored(stored, name) for name in sorted(stored.shapes)}


def next_losses(settings_file: Path, runs: list[Path], extra: tuple[str, ...] = ()) -> list[float]:
    """On a rank: the loss of the step after the latest checkpoint of each run, and of the one after, at one
    layout.
    """
    losses = []
    for folder in runs:
        settings = load_settings(settings_file, extra)
        run, loader = build_here(settings)
        step = checkpoint.load(run, latest(folder))
        for number in (step, step + 1):
            batch = loader.load(number)
            assert run.table is not None
            plan = run.table.plan(batch)
            losses.append(
                train_step(
                    run,
                    number,
                    StepInput(batch.at(run.positions), plan),
                    Hooks(Clock(torch.device("cpu")).phase),
                ).loss
            )
    close_mesh()
    return losses
