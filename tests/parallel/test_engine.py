"""The global gradient norm: every shard once, a replicated table once, and the same number at every
layout.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from hybridtrain.parallel.engine import local_gradients
from tests.parallel.groups import clip_by_global_norm, mesh_here
from tests.ranks import run_on_ranks

WHOLE = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))


def clipped(mem: int, bound: float, with_rows: bool = True) -> tuple[float, float, Tensor, Tensor]:
    """Norms, and this rank's gradients after clipping, of WHOLE cut over all ranks and ROWS over `mem` of
    them.
    """
    mesh = mesh_here(mem=mem)
    grads = [part.clone() for part in WHOLE.chunk(mesh.layout.world)[mesh.rank].split(1, dim=1)]
    bounds = mesh.layout.row_bounds(len(ROWS))
    rows = ROWS[bounds[mesh.mem.rank] : bounds[mesh.mem.rank + 1]].clone()
    norm, table = clip_by_global_norm(grads, rows if with_rows else None, mesh, bound)
    return norm, table, torch.cat(grads, 1), rows


def on_layouts(mems: list[int], bound: float) -> list[tuple[float, float, Tensor, Tensor]]:
    return [clipped(mem, bound) for mem in mems]


def empty_parts() -> tuple[float, float, float]:
    """A rank without gradients, and one without touched rows, take part all the same."""
    mesh = mesh_here()
    grads = [torch.tensor([3.0])] if mesh.rank == 0 else []
    rows = torch.tensor([[4.0]]) if mesh.rank == 1 else torch.empty(0, 1)
    norm, table = clip_by_global_norm(grads, rows, mesh, 0.0)
    return norm, table, clipped(2, 0.0, with_rows=False)[0]


def sharded_gradient() -> float:
    mesh = mesh_here()
    param = nn.Parameter(DTensor.from_local(torch.zeros(2, 3), mesh.dense_mesh, [Shard(0)]))
    param.grad = DTensor.from_local(torch.full((2, 3), 2.0), mesh.dense_mesh, [Shard(0)])
    grads = local_gradients([param, nn.Parameter(torch.zeros(1))])
    assert [type(g) for g in grads] == [Tensor]
    norm, _ = clip_by_global_norm(grads, None, mesh, 1.0)
    assert torch.allclose(
        param.grad.to_local(), torch.full((2, 3), 2.0 / norm)
    )  # the parameter's own gradient was scaled
    return norm


EXPECTED = math.sqrt(float(WHOLE.double().square().sum() + ROWS.double().square().sum()))
TABLE = math.sqrt(float(ROWS.double().square().sum()))


@pytest.mark.parametrize(("size", "mems"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 4])])
def test_is_the_norm_of_the_whole_at_every_layout(size: int, mems: list[int]) -> None:
    by_rank = run_on_ranks(on_layouts, size, mems, 0.0)
    for per_layout in by_rank:
        assert [part[:2] for part in per_layout] == [
            part[:2] for part in by_rank[0]
        ]  # bitwise the same on all ranks
        for norm, table, _, _ in per_layout:
            assert norm == pytest.approx(EXPECTED, rel=1e-6)
            assert table == pytest.approx(TABLE, rel=1e-6)
    untouched = torch.cat([per_layout[0][2] for per_layout in by_rank])
    assert torch.equal(untouched, WHOLE)  # a bound of 0 only measures


@pytest.mark.parametrize("bound", [1.0, 1000.0])
def test_clips_every_part_by_the_same_factor(bound: float) -> None:
    factor = min(1.0, bound / EXPECTED)
    by_rank = run_on_ranks(on_layouts, 2, [2], bound)
    torch.testing.assert_close(torch.cat([r[0][2] for r in by_rank]), WHOLE * factor, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.cat([r[0][3] for r in by_rank]), ROWS * factor, rtol=1e-5, atol=1e-7)


def test_parts_may_be_empty_or_absent() -> None:
    backbone = math.sqrt(float(WHOLE.double().square().sum()))
    for norm, table, without_table in run_on_ranks(empty_parts, 2):
        assert (norm, table) == (5.0, 4.0)
        assert without_table == pytest.approx(backbone, rel=1e-6)


def test_shards_of_a_parameter_count_by_their_local_part() -> None:
    assert run_on_ranks(sharded_gradient, 2) == [pytest.approx(math.sqrt(12 * 4))] * 2


def test_a_value_that_is_not_finite_reaches_every_rank() -> None:
    norms = run_on_ranks(nan_on_one, 2)
    assert all(math.isnan(n) for n in norms)


def nan_on_one() -> float:
    mesh = mesh_here()
    return clip_by_global_norm([torch.tensor([math.nan if mesh.rank else 1.0])], None, mesh, 1.0)[0]


def test_many_elements_are_summed_to_single_precision() -> None:
    ((norm, expected),) = run_on_ranks(of_many, 1)
    assert norm == pytest.approx(expected, rel=1e-6)  # one float32 running sum is 8e-5 off


def of_many() -> tuple[float, float]:
    grad = torch.randn(2**11, 2**11, generator=torch.Generator().manual_seed(2))
    return clip_by_global_norm([grad], None, mesh_here(), 0.0)[0], float(grad.double().square().sum().sqrt())
