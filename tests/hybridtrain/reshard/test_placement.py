"""What a mesh on paper says of every rank's parts is what the ranks have."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from hybridtrain.parallel.mesh import mesh_on_paper
from hybridtrain.reshard.placement import place_model
from hybridtrain.run.process_setup import resolve_layout
from hybridtrain.settings.tree import Settings
from tests.ranks import run_on_ranks
from tests.training import build_here, ci_settings

LAYOUT = (
    "parallel.pp=2",
    "parallel.tp=2",
    "parallel.mem=2",
    "parallel.mem_placement=strided",
    "model.tie_embeddings=true",
    "train.micro_batches=2",
)
Run = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def parts_here(settings: Settings) -> Run:
    """On a rank: sizes and offsets of its part of every parameter, buffer and the table."""
    run, _ = build_here(settings)
    table = run.table
    assert table is not None
    found: Run = {"table": (tuple(table.weight.shape), (table.low, 0))}
    for stage in run.model_parts:
        for name, value in stage.state_dict().items():
            if isinstance(value, DTensor):
                sizes, offsets = compute_local_shape_and_global_offset(
                    value.shape, value.device_mesh, value.placements
                )
                found[name] = (tuple(sizes), tuple(offsets))
            else:
                found[name] = (tuple(value.shape), (0,) * value.dim())
    return found


def test_paper_and_ranks_agree(ci_data: Path, tmp_path: Path) -> None:
    settings = ci_settings(tmp_path / "run", ci_data, *LAYOUT)
    placement = place_model(settings, resolve_layout(settings, 4), 1024)
    ranks: list[Run] = run_on_ranks(parts_here, 4, settings)
    assert {name for parts in ranks for name in parts} - {"table"} == set(placement.parameters)
    for name, boxes in placement.parameters.items():
        assert sum(prod(box.sizes) for box in boxes) == prod(placement.shapes[name]), name
        for box in boxes:
            assert ranks[box.rank][name] == (box.sizes, box.offsets), name
    assert {box.rank for box in placement.parameters["embed.weight"]} == {0, 1}  # tied: the first stage's
    num_rows = sum(ranks[rank]["table"][0][0] for rank in (0, 2))  # far: the copies of rows are neighbours
    boxes = placement.boxes("table.rows", (num_rows, 12))
    assert [(box.rank, box.sizes, box.offsets) for box in boxes] == [
        (rank, *ranks[rank]["table"]) for rank in (0, 2)
    ]
    assert [box.rank for box in placement.boxes("optim.norm.weight.step", ())] == [
        placement.parameters["norm.weight"][0].rank
    ]


def test_a_process_among_others_has_no_paper(tmp_path: Path) -> None:
    layout = resolve_layout(ci_settings(tmp_path / "run", tmp_path), 2)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with (
            pytest.raises(RuntimeError, match="a process that has joined no others"),
            mesh_on_paper(layout, 0),
        ):
            pass
    finally:
        dist.destroy_process_group()
