"""Runs of a few optimizer steps through the real parts, and how far two of them are apart, tensor by tensor.

A distance is a relative one: of a loss or gradient norm by its size, of a parameter or the table by how far training moved it, of
a moment or a row's second moment by its size; each over the whole tensor (2-norm). A row's `last` is the share of rows that differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from hybridtrain.assemble import Parts, Vocabulary, assemble, make_addressing, resolve_layout
from hybridtrain.checkpoint import _state
from hybridtrain.data.batches import Batch, BatchLoader
from hybridtrain.data.shards import TokenDataset
from hybridtrain.metrics import Clock
from hybridtrain.parallel.collectives import barrier
from hybridtrain.parallel.mesh import close_mesh, make_mesh
from hybridtrain.settings import Settings
from hybridtrain.train import Totals, train_step
from tests.parity.cases import Case, settings_of
from tests.parity.faults import FAULTS

KINDS = ("losses", "parameters", "moments", "rows", "row state")
"""What is compared, as the table of the matrix names it."""

State = dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """What a run came to: `start` and `end` are all tensors by their names in checkpoints, `curve` numbers of every step."""

    curve: dict[str, list[float]]
    start: State
    end: State


@dataclass(frozen=True)
class Reference:
    """The one-rank run, and how far its sums in another order were from it: the noise."""

    run: Run
    noise: dict[str, float]


@dataclass(frozen=True)
class Reordered:
    """A one-rank run that adds up the same numbers in another order."""

    micro_batches: int
    permutation: int = 0  # seed of the order of a step's sequences; 0: as they come


ORDERS = (Reordered(1), Reordered(2), Reordered(4), Reordered(8), Reordered(16), Reordered(1, 1), Reordered(2, 2), Reordered(4, 3))


def run_steps(
    settings: Settings, world: int, rank: int, rendezvous: str = "", reorder: Callable[[Batch], Batch] = lambda batch: batch
) -> tuple[Parts, list[Totals], list[State]]:
    """All steps of a run on this rank: its parts as they then are, and every stage's state before the first step."""
    mesh = make_mesh(resolve_layout(settings, world), rank, torch.device("cpu"), 60, rendezvous)
    dataset = TokenDataset.open(settings.data.path, verify=False)
    vocabulary = Vocabulary.of(dataset)
    parts = assemble(settings, mesh, vocabulary, make_addressing(settings, vocabulary))
    train, layout = settings.train, mesh.layout
    place = layout.coordinate(rank, "dp")
    loader = BatchLoader(
        dataset.split("train"), train.seq_len, train.global_batch, train.micro_batches, place, layout.dp, settings.run.seed
    )
    start = stage_states(parts) if world == 1 else []
    totals, clock = [], Clock(mesh.device)
    for step in range(train.steps):
        batch = reorder(loader.load(step))
        plan = parts.memory.plan(batch) if parts.memory is not None else None
        totals.append(train_step(parts, step, batch.at(parts.positions), plan, clock, False))
    return parts, totals, start


def stage_states(parts: Parts) -> list[State]:
    """Every tensor of each of this rank's stages, whole; copies that other ranks hold too are among them."""
    return [{name: _whole(value) for name, value in _state(parts, stage).items()} for stage in range(len(parts.stages))]


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def curves(totals: Sequence[Totals]) -> dict[str, list[float]]:
    return {name: [getattr(t, name) for t in totals] for name in ("loss", "grad_norm", "table_grad_norm")}


def run_alone(data: str, overrides: tuple[str, ...], orders: Sequence[Reordered]) -> list[Run]:
    """On a rank of several that each work alone: the one-rank runs of every so-many-th order."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    out = []
    for order in orders[rank::ranks]:
        settings = settings_of(data, *overrides, f"train.micro_batches={order.micro_batches}")
        _, totals, (start,), end = _one_rank(settings, order)
        out.append(Run(curves(totals), start, end))
    return out


def _one_rank(settings: Settings, order: Reordered) -> tuple[Parts, list[Totals], list[State], State]:
    generator = torch.Generator().manual_seed(order.permutation)

    def reorder(batch: Batch) -> Batch:
        if not order.permutation:
            return batch
        places = torch.randperm(settings.train.global_batch, generator=generator)
        return Batch(*(x.flatten(0, 1)[places].view_as(x) for x in (batch.tokens, batch.targets, batch.starts)))

    parts, totals, start = run_steps(settings, 1, 0, reorder=reorder)
    (end,) = stage_states(parts)
    return parts, totals, start, end


def make_reference(runs: Sequence[Run]) -> Reference:
    """The first run, and the noise of every number: the farthest of the others from it."""
    first, others = runs[0], [distances(run.curve, [run.end], runs[0]) for run in runs[1:]]
    return Reference(first, {name: max(_rounding(name, first), *(other[name] for other in others)) for name in others[0]})


def _rounding(name: str, run: Run) -> float:
    """What storing it in float32 alone makes: half a unit of every element's last place (weights near 1 move by few of them), of
    what is a single number one."""
    unit = torch.finfo(torch.float32).eps
    if name.startswith("curve."):
        return unit
    scale = _scale(name, run) if run.end[name].is_floating_point() else 0.0
    return unit / 2 * float(torch.linalg.vector_norm(run.end[name].double())) / scale if scale else 0.0


def distances(curve: dict[str, list[float]], states: Sequence[State], reference: Run) -> dict[str, float]:
    """How far a rank's numbers are from the reference's, by name; of what it holds twice the farther."""
    out = {
        f"curve.{name}": max(abs(a - b) / abs(b) for a, b in zip(values, reference.curve[name], strict=True))
        for name, values in curve.items()
    }
    for state in states:
        for name, value in state.items():
            out[name] = max(out.get(name, 0.0), _distance(name, value, reference))
    return out


def _distance(name: str, value: Tensor, reference: Run) -> float:
    wanted = reference.end[name]
    assert value.shape == wanted.shape, f"{name}: {list(value.shape)}, not {list(wanted.shape)}"
    if not wanted.is_floating_point():
        return float((value != wanted).double().mean())
    scale, difference = _scale(name, reference), float(torch.linalg.vector_norm((value - wanted).double()))
    return difference / scale if scale else (0.0 if difference == 0 else float("inf"))


def _scale(name: str, run: Run) -> float:
    moved = name.startswith("model.") or name == "memory.table"
    return float(torch.linalg.vector_norm((run.end[name] - run.start[name] if moved else run.end[name]).double()))


def kind_of(name: str) -> str:
    """Which of KINDS a number is."""
    if name == "memory.table":
        return "rows"
    return {"curve": "losses", "model": "parameters", "optim": "moments", "memory": "row state"}[name.split(".")[0]]


def run_cases(data: str, references: dict[tuple[str, ...], str], cases: Sequence[Case], store: str, fault: str = "") -> list[dict[str, float]]:
    """On a rank: every case in a world of its own, and this rank's distances from the reference of its variant.

    `references` are files by `Case.numbers`. `fault` names one of FAULTS, a mistake that the comparison must notice.
    """
    rank, world, out = dist.get_rank(), dist.get_world_size(), []
    for number, case in enumerate(cases):
        reference: Reference = torch.load(references[case.numbers], weights_only=False, mmap=True)
        close_mesh()
        _clear_sharding_prop_cache()  # it knows meshes by their shape, and would hand out those of the case before
        try:
            with FAULTS[fault]() if fault else nullcontext():
                settings = settings_of(data, *case.overrides)
                parts, totals, _ = run_steps(settings, world, rank, f"file://{store}-{number}")
            states = stage_states(parts)
            out.append(distances(curves(totals), states, reference.run))
            barrier(parts.mesh.world)  # none closes its groups while another still talks
        except Exception as error:
            raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
    return out


def merge(ranks: Sequence[dict[str, float]], reference: Reference) -> dict[str, float]:
    """The farthest rank's distance of every number; all numbers of the reference must be on some rank."""
    names = set().union(*ranks)
    assert names == set(reference.noise), names ^ set(reference.noise)
    return {name: max(rank.get(name, 0.0) for rank in ranks) for name in sorted(names)}


def multiples(distance: dict[str, float], noise: dict[str, float]) -> dict[str, float]:
    """Distances as multiples of the noise; what has no noise must be equal."""
    return {name: value / noise[name] if noise[name] else (0.0 if value == 0 else float("inf")) for name, value in distance.items()}
