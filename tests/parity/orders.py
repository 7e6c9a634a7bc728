"""The one-rank run, and the same sums in other orders: what rounding alone does to a run, the noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hybridtrain.data.batches import Batch
from hybridtrain.kernels.choose import Backends
from hybridtrain.kernels.moe_swiglu.op import Choice, ExpertWeights
from hybridtrain.model.feedforwards import moe
from hybridtrain.parallel import engine
from tests.parity.cases import settings_of
from tests.parity.runs import Record, curves, distances, scale_of, stage_states, start_run, train_steps


@dataclass(frozen=True)
class Order:
    """One order of the same sums; the defaults are the reference's."""

    micro_batches: int = 1  # sums over tokens in so many parts
    permutation: int = 0  # seed of the order of a step's sequences; 0: as they come
    parts: int = 1  # products and norms in so many parts, added up; experts' widths in two


ORDERS = (Order(), Order(2), Order(4), Order(8), Order(1, 1), Order(4, 2), Order(1, 0, 2), Order(2, 3, 4))


@dataclass(frozen=True)
class Reference:
    """The one-rank run, and by name how far the other orders were from it at most."""

    run: Record
    noise: dict[str, float]


def run_alone(data: str, runs: Sequence[tuple[tuple[str, ...], Order]]) -> list[Record]:
    """On one of several ranks, each of which works alone: every so-many-th run, given by settings and
    order.
    """
    return [
        _one_rank(data, overrides, order)
        for overrides, order in runs[dist.get_rank() :: dist.get_world_size()]
    ]


def _one_rank(data: str, overrides: tuple[str, ...], order: Order) -> Record:
    settings = settings_of(data, *overrides, f"train.micro_batches={order.micro_batches}")
    generator = torch.Generator().manual_seed(order.permutation)

    def reorder(batch: Batch) -> Batch:
        if not order.permutation:
            return batch
        places = torch.randperm(settings.train.global_batch, generator=generator)
        return Batch(
            *(x.flatten(0, 1)[places].view_as(x) for x in (batch.tokens, batch.targets, batch.starts))
        )

    parts, load = start_run(settings, 1, 0, reorder=reorder)
    (start,) = stage_states(parts)
    with _in_parts(order.parts):
        totals = train_steps(parts, load, 0, settings.train.steps)
    (end,) = stage_states(parts)
    return Record(curves(totals), start, end)


@contextmanager
def _in_parts(parts: int) -> Iterator[None]:
    """Add up every matrix product in so many parts, forward and backward, as tensor parallelism does, and
    every gradient's norm, as sharding does."""
    if parts == 1:
        yield
        return
    linear: Callable[..., Tensor] = F.linear
    swiglu, gradients = moe.moe_swiglu, engine.local_gradients

    def linear_in_parts(x: Tensor, weight: Tensor, bias: None = None) -> Tensor:
        outputs = [
            torch.stack(
                [linear(a, b) for a, b in zip(x.chunk(parts, -1), rows.chunk(parts, 1), strict=True)]
            ).sum(0)
            for rows in weight.chunk(parts, 0)
        ]
        return torch.cat(outputs, -1)

    def swiglu_in_parts(x_ND: Tensor, choice: Choice, weights: ExpertWeights, backends: Backends) -> Tensor:
        halves = min(parts, 2)  # grouped products have widths of multiples of 4
        cut = zip(*(w.chunk(halves, dim) for w, dim in zip(weights, (2, 2, 1), strict=True)), strict=True)
        return torch.stack(
            [swiglu(x_ND, choice, ExpertWeights(*(w.contiguous() for w in part)), backends) for part in cut]
        ).sum(0)

    def gradients_in_parts(params: Any) -> list[Tensor]:
        return [part for grad in gradients(params) for part in grad.view(-1).chunk(parts)]

    with (
        patch.object(F, "linear", linear_in_parts),
        patch.object(moe, "moe_swiglu", swiglu_in_parts),
        patch.object(engine, "local_gradients", gradients_in_parts),
        patch.object(engine, "tp_copies", lambda params, tp: [1] * len(gradients_in_parts(params))),
    ):
        yield


def make_reference(runs: Sequence[Record]) -> Reference:
    """The first run; the noise of every number is the farthest of the others from it, and no less than its
    own rounding.
    """
    first = runs[0]
    others = [distances(run.curve, [run.end], first) for run in runs[1:]]
    return Reference(
        first, {name: max(_rounding(name, first), *(other[name] for other in others)) for name in others[0]}
    )


def _rounding(name: str, run: Record) -> float:
    """What storing it in float32 makes: half a unit of every element's last place (weights near 1 move by few
    such units a step), of what is a single number one."""
    unit = torch.finfo(torch.float32).eps
    if name.startswith("curve."):
        return unit
    scale = scale_of(name, run) if run.end[name].is_floating_point() else 0.0
    return unit / 2 * float(torch.linalg.vector_norm(run.end[name].double())) / scale if scale else 0.0
