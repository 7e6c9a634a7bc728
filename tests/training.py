"""Training runs for tests: the shipped ci configuration on a small slice of the shipped texts, on any number
of ranks.
"""

from __future__ import annotations

import errno
import lzma
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hybridtrain.checkpoint import Saver
from hybridtrain.data.batches import BatchLoader, BatchShare
from hybridtrain.data.prepare import prepare
from hybridtrain.data.shards import TokenDataset
from hybridtrain.model.init import Draw, init_parameters
from hybridtrain.model.lm import HybridLM
from hybridtrain.monitor.metrics import read_metrics
from hybridtrain.parallel.mesh import Joining, close_mesh, make_mesh
from hybridtrain.parallel.replicas import Bucket, local_part
from hybridtrain.parallel.zero import ReplicaEngine
from hybridtrain.run.assemble import Run, Vocabulary, assemble, make_addressing
from hybridtrain.run.process_setup import compute_dtype, resolve_layout
from hybridtrain.run.step import StepInput, train_step
from hybridtrain.settings.load import load_settings
from hybridtrain.settings.tree import Settings
from tests.ranks import run_on_ranks

TINY = (
    "train.global_batch=4",
    "train.seq_len=64",
    "train.eval_batches=1",
    "model.dim=16",
    'model.layers=["engram+attention+moe", "attention+dense"]',
    "model.attention.num_heads=2",
    "model.attention.num_kv_heads=2",
    "model.attention.head_dim=8",
    "model.dense.hidden=32",
    "model.moe.hidden=16",
    "model.moe.num_experts=4",
    "engram.heads=2",
    "engram.head_dim=8",
    "engram.rows_per_head=200",
)
"""Overrides of configs/ci.toml for tests of what surrounds the model."""

CI = Path(__file__).parents[1] / "configs" / "ci.toml"


def make_data(out: Path, documents: int = 800) -> Path:
    """A data folder of the first shipped sentences, so short that most windows of 48 tokens and more have a
    border in them.
    """
    shipped = resources.files("hybridtrain.data") / "corpus" / "sotu-sentences.jsonl.xz"
    source = out.with_suffix(".jsonl")
    source.write_bytes(b"\n".join(lzma.decompress(shipped.read_bytes()).splitlines()[:documents]))
    prepare([source], out, vocab_size=1024, validation_fraction=0.1, progress=False)
    return out


def ci_settings(run_dir: Path, data: Path, *overrides: str) -> Settings:
    return load_settings(CI, [f"run.dir={run_dir}", f"data.path={data}", "data.source=[]", *overrides])


def train_here(settings: Settings, resume: bool) -> dict[str, Any]:
    """On a rank: `hybridtrain train`, which starts its own process groups or, alone, none."""
    from hybridtrain.run.loop import train

    if dist.get_world_size() == 1:
        dist.destroy_process_group()
    return train(settings, resume)


def train_on(
    nproc: int, settings: Settings, resume: bool = False, timeout: float = 120
) -> list[dict[str, Any]]:
    """Every rank's summary of the run."""
    return run_on_ranks(train_here, nproc, settings, resume, timeout=timeout)


def loss_curve(run_dir: Path) -> list[float]:
    """The training loss of every step, exactly as written."""
    lines = [line for line in read_metrics(run_dir) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def train_and_kill(settings: Settings, resume: bool, rank: int, step: int, during: str) -> None:
    """On a rank of the launcher: train, and end this rank by SIGKILL in step `step` (from 1), or SIGTERM it
    as a user would.

    `during`: "step" and "save" kill it at the start of that step or of the checkpoint after it; "sigterm"
    signals it.
    """
    from hybridtrain.run import loop as module

    real_step, real_save = module.train_step, Saver.save

    def train_step(run: Any, number: int, *rest: Any, **named: Any) -> Any:
        if number + 1 == step and run.mesh.rank == rank and during != "save":
            os.kill(os.getpid(), signal.SIGKILL if during == "step" else signal.SIGTERM)
        return real_step(run, number, *rest, **named)

    def save(saver: Any, done: int, wait: bool) -> Any:
        if done == step and saver.run.mesh.rank == rank and during == "save":
            os.kill(os.getpid(), signal.SIGKILL)
        return real_save(saver, done, wait)

    module.train_step = train_step  # type: ignore[assignment]
    Saver.save = save  # type: ignore[assignment,method-assign]
    module.train(settings, resume)


def train_on_a_full_disk(settings: Settings, rank: int, step: int) -> None:
    """On a rank of the launcher: train; rank `rank` cannot write its part of the checkpoint after `step`
    steps.
    """
    from hybridtrain.checkpoint.files import Writer
    from hybridtrain.run.loop import train

    real = Writer.write_data

    def write_data(self: Any, *rest: Any) -> Any:
        if dist.get_rank() == rank and f"{step:08d}" in str(self.path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, *rest)

    Writer.write_data = write_data  # type: ignore[method-assign]
    train(settings)


@dataclass(frozen=True)
class Trace:
    """What some steps came to on one rank, bit for bit: losses, and the gradients that the optimizers got,
    whole.
    """

    losses: list[float]
    statistics: list[dict[str, Tensor]]
    gradients: list[dict[str, Tensor]]
    state: dict[str, Tensor]  # parameters, and this rank's part of the table
    traffic: dict[tuple[str, str], tuple[int, int]]


def build_here(settings: Settings) -> tuple[Run, BatchLoader]:
    """On a rank of run_on_ranks, or alone: the run's parts on this world, and this rank's batches."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    mixed = compute_dtype(settings, torch.device("cpu")) != torch.float32
    mesh = make_mesh(resolve_layout(settings, world), rank, torch.device("cpu"), 60, Joining(always=mixed))
    dataset = TokenDataset.open(settings.data.path, verify=False)
    vocabulary = Vocabulary.of(dataset)
    run = assemble(settings, mesh, vocabulary, make_addressing(settings, vocabulary))
    train, layout = settings.train, mesh.layout
    share = BatchShare(train.global_batch, train.micro_batches, layout.coordinate(rank, "dp"), layout.dp)
    loader = BatchLoader(dataset.split("train"), train.seq_len, share, seed=0)
    return run, loader


def complete_gradients(run: Run) -> None:
    """Every parameter's `.grad` is the sum over ranks, also where another rank updates it. Collective; called
    between the sums and the update.
    """
    for bucket in _buckets(run):
        for wait in bucket.begin_spread(bucket.gradients):
            wait()


def updated_weights(run: Run) -> dict[nn.Parameter, Tensor]:
    """What optimizers update in the place of parameters, on every rank. Collective."""
    out: dict[nn.Parameter, Tensor] = {}
    for bucket in _buckets(run):
        whole = torch.empty_like(bucket.gradients)
        whole[bucket.updated] = bucket.weights
        for wait in bucket.begin_spread(whole):
            wait()
        sizes = [local_part(replica.gradient).numel() for replica in bucket.replicas]
        for replica, flat in zip(bucket.replicas, whole.split(sizes), strict=True):
            weight = out[replica.parameter] = torch.empty_like(replica.gradient)
            local_part(weight).copy_(flat.view_as(local_part(weight)))
    return out


def _buckets(run: Run) -> Sequence[Bucket]:
    return run.engine.replicas.buckets if isinstance(run.engine, ReplicaEngine) else ()


def drawn_whole_and_in_halves(settings: Settings) -> tuple[HybridLM, HybridLM]:
    """Two models with initial values, each parameter of the second drawn in two halves of its rows."""
    whole, halves = HybridLM(settings, 64), HybridLM(settings, 64)
    init_parameters(whole, settings)

    def write(parameter: Tensor, draw_this: Draw) -> None:
        half = len(parameter) // 2
        parameter[:half] = draw_this(rows=slice(0, half))
        parameter[half:] = draw_this(rows=slice(half, None))

    init_parameters(halves, settings, write)
    return whole, halves


def trace(settings: Settings, steps: int = 3) -> Trace:
    alone = not dist.is_initialized()
    run, loader = build_here(settings)
    table = run.table
    out = Trace([], [], [], {}, {})
    named = {
        f"{i}.{name}": p for i, stage in enumerate(run.model_parts) for name, p in stage.named_parameters()
    }

    def note(*_: Any) -> None:
        complete_gradients(run)
        out.gradients[-1].update({name: _whole(p.grad) for name, p in named.items() if p.grad is not None})

    for optimizer in run.engine.optimizers:
        optimizer.register_step_pre_hook(note)
    for number in range(steps):
        batch = loader.load(number)
        plan = table.plan(batch) if table is not None else None
        out.gradients.append({})
        totals = train_step(run, number, StepInput(batch.at(run.positions), plan))
        out.losses.append(totals.loss)
        out.statistics.append(
            {name: torch.tensor(value, dtype=torch.float64) for name, value in totals.statistics.items()}
        )
    weights = updated_weights(run)
    out.state.update({name: _whole(weights.get(p, p)) for name, p in named.items()})
    if table is not None:
        out.state["table"] = table.weight.clone()
    out.traffic.update(
        {key: value for key, value in run.mesh.traffic.entries().items() if "plan" not in key[0]}
    )
    if alone:
        close_mesh()
    return out


def traces(runs: list[Settings], steps: int = 3) -> list[Trace]:
    """On a rank: `trace` of one run after the other."""
    return [trace(settings, steps) for settings in runs]


def assert_bitwise(ours: Trace, theirs: Trace) -> None:
    """The same losses, statistics, gradients and parameters, bit for bit."""
    assert ours.losses == theirs.losses
    for mine, other in zip(
        [*ours.statistics, *ours.gradients, ours.state],
        [*theirs.statistics, *theirs.gradients, theirs.state],
        strict=True,
    ):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            assert torch.equal(value, other[name]), name


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
