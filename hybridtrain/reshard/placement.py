"""Which part of every tensor each rank of a layout has, found without those ranks: by the code that would put
them there.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from hybridtrain.model.lm import HybridLM, Part
from hybridtrain.parallel.apply import Sharding, parallelize
from hybridtrain.parallel.layout import Layout
from hybridtrain.parallel.mesh import Mesh, mesh_on_paper
from hybridtrain.run.assemble import resolve_stages
from hybridtrain.run.process_setup import shards_parameters
from hybridtrain.settings.tree import Settings

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """The part of a tensor that `rank` reads, as the first of the ranks that read it: `sizes` elements from
    `offsets` on, in each dim.
    """

    rank: int
    offsets: Shape
    sizes: Shape

    def meets(self, low: int, high: int) -> bool:
        """Whether it has any of the rows `low` to `high-1`; a tensor without dims is one row."""
        return not self.sizes or max(low, self.offsets[0]) < min(high, self.offsets[0] + self.sizes[0])

    def rows(self, low: int, high: int) -> tuple[Shape, Shape]:
        """Offsets and sizes of its part of these rows."""
        if not self.sizes:
            return (), ()
        low, high = max(low, self.offsets[0]), min(high, self.offsets[0] + self.sizes[0])
        return (low, *self.offsets[1:]), (high - low, *self.sizes[1:])


@dataclass(frozen=True)
class Placement:
    """The parts of a model on the ranks of a layout. `parameters`: of parameters and buffers, by name."""

    layout: Layout
    parameters: Mapping[str, list[Box]]
    shapes: Mapping[str, Shape]

    def boxes(self, name: str, shape: Shape) -> list[Box]:
        """The parts of a checkpoint's tensor, which together are all of it. A tensor that belongs to no rank
        is rank 0's.

        Optimizer state of a parameter's shape lies where the parameter does; rows of the table and their
        state lie at their owners.
        """
        kind, _, rest = name.partition(".")
        if kind == "optim" and rest.rpartition(".")[0] in self.parameters:
            rest = rest.rpartition(".")[0]
        if kind in ("model", "optim") and rest in self.parameters:
            boxes = self.parameters[rest]
            return boxes if shape == self.shapes[rest] else [_whole(boxes[0].rank, shape)]
        if kind == "table" and shape and (rest == "rows" or rest.startswith("state.")):
            bounds = itertools.pairwise(self.layout.row_bounds(shape[0]))
            return [
                Box(self._owner(number), (low, *[0] * (len(shape) - 1)), (high - low, *shape[1:]))
                for number, (low, high) in enumerate(bounds)
                if low < high
            ]
        return [_whole(0, shape)]

    def _owner(self, number: int) -> int:
        return next(
            rank for rank in range(self.layout.world) if self.layout.coordinate(rank, "mem") == number
        )


def place_model(settings: Settings, layout: Layout, vocab_size: int) -> Placement:
    """Where the model of `settings` lies at `layout`: each stage is put on paper once, on the meta device."""
    boxes: dict[str, list[Box]] = {}
    shapes: dict[str, Shape] = {}
    stages = resolve_stages(settings, vocab_size)
    for pp_rank in range(layout.pp):
        first = next(rank for rank in range(layout.world) if layout.coordinate(rank, "pp") == pp_rank)
        with mesh_on_paper(layout, first) as mesh:
            for stage in (s for s in stages if s.pp_rank == pp_rank):
                part = Part(stage.low, stage.high, stage.is_first, stage.is_last)
                for name, value in _stage_tensors(settings, vocab_size, part, mesh).items():
                    if (
                        name not in boxes or stage.is_first
                    ):  # of what two stages hold the first one's is saved
                        shapes[name] = tuple(value.shape)
                        boxes[name] = _boxes(value, first)
    return Placement(layout, boxes, shapes)


def _stage_tensors(settings: Settings, vocab_size: int, part: Part, mesh: Mesh) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = HybridLM(settings, vocab_size, part)
    sharding = Sharding(fsdp=shards_parameters(settings))
    parallelize(model, list(model.layers.values()), model.components, mesh, sharding)
    tensors: dict[str, Tensor] = model.state_dict()
    return tensors


def _boxes(value: Tensor, first: int) -> list[Box]:
    if not isinstance(value, DTensor):
        return [_whole(first, tuple(value.shape))]
    mesh = value.device_mesh
    found: dict[Shape, Box] = {}
    for place in itertools.product(*(range(n) for n in mesh.mesh.shape)):
        sizes, offsets = _compute_local_shape_and_global_offset(
            value.shape, mesh.mesh.shape, list(place), value.placements
        )
        if all(sizes) and offsets not in found:  # replicas have the same
            found[offsets] = Box(int(mesh.mesh[place]), tuple(offsets), tuple(sizes))
    return list(found.values())


def _whole(rank: int, shape: Sequence[int]) -> Box:
    return Box(rank, (0,) * len(shape), tuple(shape))
