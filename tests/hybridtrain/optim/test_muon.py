"""Muon against torch's on plain tensors, and on two gloo ranks against itself unsharded. The file is also the
ranks' script.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from hybridtrain.optim.muon import Muon, orthogonalize

ROOT = Path(__file__).parents[3]
SHAPES = {"uneven": (5, 8), "wide": (6, 10), "experts": (4, 6, 3), "cut experts": (3, 6, 4)}
PLACEMENTS = {"uneven": Shard(0), "wide": Shard(1), "experts": Shard(0), "cut experts": Shard(1)}


def draw(name, round_number):
    return torch.randn(
        SHAPES[name], generator=torch.Generator().manual_seed(100 * round_number + list(SHAPES).index(name))
    )


def run(parameters, distribute, rounds=3):
    optimizer = Muon(
        [{"params": [p], "input_first": p.ndim == 3} for p in parameters.values()], lr=0.1, weight_decay=0.1
    )
    for number in range(1, rounds + 1):
        for name, parameter in parameters.items():
            parameter.grad = distribute(name, draw(name, number))
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (12, 4), (3, 5, 7), (2, 3, 9, 4)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    values = torch.linalg.svdvals(
        orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    )
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_orthogonalize_keeps_zero_and_works_matrix_by_matrix():
    stack = torch.stack([torch.zeros(3, 4), torch.randn(3, 4)])
    out = orthogonalize(stack)
    assert torch.equal(out[0], torch.zeros(3, 4))
    torch.testing.assert_close(out[1], orthogonalize(stack[1]))


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
def test_is_torchs_muon_up_to_its_bfloat16(shape):
    ours, theirs = (
        torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1))) for _ in range(2)
    )
    start = ours.detach().clone()
    optimizers = [
        Muon([ours], lr=0.1, weight_decay=0.3),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.3),
    ]
    for number in range(3):
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = grad.clone()
            optimizer.step()
    assert (ours - theirs).norm() < 0.01 * (ours - start).norm()


def test_experts_update_as_their_transposed_matrices_do():
    experts = torch.nn.Parameter(torch.randn(2, 4, 12))
    linears = [torch.nn.Parameter(expert.T.contiguous()) for expert in experts.detach()]
    optimizers = [Muon([{"params": [experts], "input_first": True}], lr=0.1), Muon(linears, lr=0.1)]
    experts.grad = torch.randn(2, 4, 12)
    for linear, grad in zip(linears, experts.grad, strict=True):
        linear.grad = grad.T.contiguous()
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(experts.detach(), torch.stack([linear.detach().T for linear in linears]))


def test_refuses_vectors_and_skips_parameters_without_gradient():
    with pytest.raises(ValueError, match=r"got a parameter of shape \[3\]"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    Muon([parameter], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(parameter, torch.ones(2, 2))


def test_sharded_updates_are_the_unsharded_ones_bitwise(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / "store")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)


def on_rank(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))

    def place(name, tensor):
        return distribute_tensor(tensor, mesh, [PLACEMENTS[name]])

    alone = {name: torch.nn.Parameter(draw(name, 0)) for name in SHAPES}
    run(alone, lambda _, grad: grad)
    spread = {name: torch.nn.Parameter(place(name, draw(name, 0))) for name in SHAPES}
    optimizer = run(spread, place)
    for name, parameter in spread.items():
        assert isinstance(parameter.data, DTensor), name
        assert parameter.placements == (PLACEMENTS[name],), name
        assert torch.equal(parameter.full_tensor(), alone[name]), name
        assert optimizer.state[parameter]["momentum_buffer"].placements == parameter.placements, name

    with CommDebugMode() as traffic:
        optimizer.step()
    assert traffic.get_total_counts() == 3  # one gather for each of the parameters whose matrices are cut
    replicated = torch.nn.Parameter(distribute_tensor(draw("wide", 0), mesh, [Replicate()]))
    with CommDebugMode() as traffic:
        replicated.grad = distribute_tensor(draw("wide", 1), mesh, [Replicate()])
        before = traffic.get_total_counts()
        Muon([replicated], lr=0.1).step()
    assert traffic.get_total_counts() == before
    dist.destroy_process_group()


if __name__ == "__main__":
    on_rank(int(sys.argv[1]), sys.argv[2])
