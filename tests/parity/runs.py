"""Runs of a few optimizer steps through the real parts, on ranks that a test started, and how far two runs
are apart.

A distance is relative, by name and over the whole tensor (2-norm): of a loss or norm to its size, of a
parameter or the table to how far training moved it, of a moment or a row's second moment to its size. Of
integers it is the share that differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from hybridtrain.data.batches import Batch, BatchLoader, BatchShare
from hybridtrain.data.shards import TokenDataset
from hybridtrain.monitor.clock import Clock
from hybridtrain.parallel.collectives import barrier
from hybridtrain.parallel.mesh import Joining, close_mesh, make_mesh
from hybridtrain.parallel.row_exchange import StepPlan
from hybridtrain.run.assemble import Run, Vocabulary, assemble, make_addressing
from hybridtrain.run.process_setup import resolve_layout
from hybridtrain.run.step import Hooks, StepInput, Totals, train_step
from hybridtrain.settings.tree import Settings
from tests.parity.cases import Case, settings_of
from tests.parity.faults import FAULTS

State = dict[str, Tensor]
Load = Callable[[int], tuple[Batch, StepPlan | None, Batch]]
"""A step's batch here, its plan, and the batch with whole sequences."""


@dataclass(frozen=True)
class Record:
    """What a run came to: `curve` has numbers of every step, `start` and `end` all tensors by their names in
    checkpoints.
    """

    curve: dict[str, list[float]]
    start: State
    end: State


def start_run(
    settings: Settings,
    world: int,
    rank: int,
    rendezvous: str = "",
    reorder: Callable[[Batch], Batch] = lambda batch: batch,
) -> tuple[Run, Load]:
    """A run's parts on this rank, and its steps' batches; wired as `train` does it, without the background
    thread.
    """
    mesh = make_mesh(resolve_layout(settings, world), rank, torch.device("cpu"), 60, Joining(rendezvous))
    dataset = TokenDataset.open(settings.data.path, verify=False)
    vocabulary = Vocabulary.of(dataset)
    run = assemble(settings, mesh, vocabulary, make_addressing(settings, vocabulary))
    train, layout = settings.train, mesh.layout
    share = BatchShare(train.global_batch, train.micro_batches, layout.coordinate(rank, "dp"), layout.dp)
    loader = BatchLoader(dataset.split("train"), train.seq_len, share, settings.run.seed)

    def load(step: int) -> tuple[Batch, StepPlan | None, Batch]:
        batch = reorder(loader.load(step))
        return batch.at(run.positions), run.table.plan(batch) if run.table is not None else None, batch

    return run, load


def train_steps(run: Run, load: Load, start: int, stop: int) -> list[Totals]:
    """Steps `start` to `stop-1`, each with the next one's plan at hand where there is one."""
    totals, clock, (batch, plan, _) = [], Clock(run.mesh.device), load(start)
    if run.table is not None:
        run.table.resume(plan)
    for step in range(start, stop):
        upcoming, next_plan, _ = load(step + 1) if step + 1 < stop else (batch, None, batch)
        totals.append(train_step(run, step, StepInput(batch, plan, next_plan), Hooks(clock.phase)))
        batch, plan = upcoming, next_plan
    return totals


def new_world(store: str) -> str:
    """End the world that this rank is in; returns where the next one meets, at a file that does not exist
    yet.
    """
    close_mesh()
    # it knows meshes by their shape, and would hand out those of the world before
    _clear_sharding_prop_cache()
    return f"file://{store}"


def stage_states(run: Run) -> list[State]:
    """Every tensor of each of this rank's stages, whole; copies that other ranks hold too are among them."""
    return [
        {name: whole(value) for name, value in _state(run, stage).items()}
        for stage in range(len(run.model_parts))
    ]


def _state(run: Run, stage: int) -> State:
    """By their names in checkpoints; the table goes with the rank's first stage."""
    table = run.table.state() if run.table is not None and stage == 0 else {}
    return {**run.engine.state(stage), **{f"table.{name}": value for name, value in table.items()}}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def curves(totals: Sequence[Totals]) -> dict[str, list[float]]:
    return {name: [getattr(t, name) for t in totals] for name in ("loss", "grad_norm", "table_grad_norm")}


def distances(curve: dict[str, list[float]], states: Sequence[State], reference: Record) -> dict[str, float]:
    """How far a rank's numbers are from the reference's, by name; of what it holds twice the farther."""
    out = {
        f"curve.{name}": max(abs(a - b) / abs(b) for a, b in zip(values, reference.curve[name], strict=True))
        for name, values in curve.items()
    }
    for state in states:
        for name, value in state.items():
            out[name] = max(out.get(name, 0.0), _distance(name, value, reference))
    return out


def _distance(name: str, value: Tensor, reference: Record) -> float:
    wanted = reference.end[name]
    assert value.shape == wanted.shape, f"{name}: {list(value.shape)}, not {list(wanted.shape)}"
    if not wanted.is_floating_point():
        return float((value != wanted).double().mean())
    scale, difference = scale_of(name, reference), float(torch.linalg.vector_norm((value - wanted).double()))
    if not difference < float("inf"):
        return float("inf")  # not finite
    return difference / scale if scale else (0.0 if difference == 0 else float("inf"))


def scale_of(name: str, run: Record) -> float:
    moved = name.startswith("model.") or name == "table.rows"
    return float(
        torch.linalg.vector_norm((run.end[name] - run.start[name] if moved else run.end[name]).double())
    )


def run_cases(
    data: str, references: dict[tuple[str, ...], str], cases: Sequence[tuple[Case, str]], store: str
) -> list[dict[str, float]]:
    """On a rank: every case in a world of its own, and this rank's distances from the one-rank run.

    `references` are files of runs by `Case.numbers`. With a case goes the name of one of FAULTS to make in
    it, or "".
    """
    rank, world, out = dist.get_rank(), dist.get_world_size(), []
    for number, (case, fault) in enumerate(cases):
        reference: Record = torch.load(references[case.numbers], weights_only=False, mmap=True)
        rendezvous = new_world(f"{store}-{number}")
        try:
            with FAULTS[fault]() if fault else nullcontext():
                settings = settings_of(data, *case.overrides)
                run, load = start_run(settings, world, rank, rendezvous)
                totals = train_steps(run, load, 0, settings.train.steps)
            out.append(distances(curves(totals), stage_states(run), reference))
            barrier(run.mesh.world)  # none closes its groups while another still talks
        except Exception as error:
            raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
    return out
