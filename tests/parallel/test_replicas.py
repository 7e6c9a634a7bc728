"""Parameters that ranks hold whole: gradients summed in rank order, each parameter updated by one owner."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from hybridtrain.parallel import replicas as replicas_file
from hybridtrain.parallel.collectives import Group
from hybridtrain.parallel.replicas import Replicas, make_replicas
from tests.parallel.groups import mesh_here
from tests.ranks import run_on_ranks

RANKS, WIDTH, MICRO_BATCHES = 3, 5, 2


class Net(nn.Module):
    """Three products, of which the middle one may be left out; one vector is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.unused = nn.Parameter(torch.ones(7))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x_ND: Tensor, skip: bool = False) -> Tensor:
        for number, layer in enumerate(self.layers):
            x_ND = x_ND if skip and number == 1 else torch.tanh(layer(x_ND))
        return x_ND.square().sum()


def inputs(rank: int, micro_batch: int) -> Tensor:
    """Of very different sizes, so that another order is another sum."""
    generator = torch.Generator().manual_seed(RANKS * micro_batch + rank)
    return torch.randn(4, WIDTH, generator=generator) * 30.0**-rank


def net_in_buckets(group: Group, shared: bool, dtype: torch.dtype = torch.float32) -> tuple[Net, Replicas]:
    net = Net()
    costs = {parameter: float(parameter.numel()) for parameter in net.parameters()}
    return net, make_replicas(costs, lambda _: group, dtype, shared)


def gradients_of(rank: int) -> list[Tensor]:
    """What one rank adds up over its micro-batches."""
    net = Net()
    for m in range(MICRO_BATCHES):
        net(inputs(rank, m)).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]


def check_sums(shared: bool, early: bool, bucket: int) -> tuple[list[int], int]:
    """Compares with sums in rank order; returns which parameters are updated here, and how many buckets."""
    replicas_file.BUCKET = bucket
    mesh = mesh_here()
    group = mesh.own_group("copies", "copies")
    net, replicas = net_in_buckets(group, shared)
    expected = [((a + b) + c) for a, b, c in zip(*(gradients_of(rank) for rank in range(RANKS)), strict=True)]
    for _ in range(2):  # a second step starts anew
        for m in range(MICRO_BATCHES):
            replicas.expect_last(early and m == MICRO_BATCHES - 1)
            net(inputs(mesh.rank, m)).backward()
        replicas.end_sums()
        here = [n for n, p in enumerate(net.parameters()) if replicas.updated_here(p) is not None]
        for number, parameter in enumerate(net.parameters()):
            gradient = replicas.gradient(parameter)
            assert gradient is not None
            assert number not in here or torch.equal(gradient, expected[number]), number
            assert replicas.updated_by(parameter) == (1 if shared else RANKS)
        replicas.clear()
        assert all(parameter.grad is None for parameter in net.parameters())
    sent = {
        operation: count
        for (name, operation), (count, _) in group.traffic.entries().items()
        if name == "copies"
    }
    assert sent == {"all_to_all": 2 * len(replicas.buckets)} | (
        {} if shared else {"broadcast": sent.get("broadcast")}
    )
    return here, len(replicas.buckets)


@pytest.mark.parametrize("early", [True, False], ids=["early", "late"])
@pytest.mark.parametrize("shared", [True, False], ids=["zero1", "zero0"])
def test_sums_have_the_order_of_the_ranks(shared: bool, early: bool) -> None:
    for bucket, buckets in ((1, 7), (60, 2), (10**6, 1)):
        results = run_on_ranks(check_sums, RANKS, shared, early, bucket)
        assert {count for _, count in results} == {buckets}
        owned = [here for here, _ in results]
        every = sorted(n for here in owned for n in here)
        assert every == ([*range(7)] if shared else sorted([*range(7)] * RANKS))


def updated_everywhere(dtype: torch.dtype) -> list[Tensor]:
    """The parameters as this rank computes with them, after its own were set to 1 + their number."""
    mesh = mesh_here()
    net, replicas = net_in_buckets(mesh.own_group("copies", "copies"), True, dtype)
    for number, parameter in enumerate(net.parameters()):
        assert parameter.dtype == dtype
        here = replicas.updated_here(parameter)
        if here is not None:
            assert here.dtype == torch.float32
            here.fill_(1 + number)
    replicas.spread()
    replicas.await_parameters()
    return [parameter.detach() for parameter in net.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rank_gets_the_updates_of_all_owners(dtype: torch.dtype) -> None:
    for parameters in run_on_ranks(updated_everywhere, RANKS, dtype):
        for number, parameter in enumerate(parameters):
            assert torch.equal(parameter, torch.full_like(parameter, 1 + number))


def alone() -> Group:
    return Group("copies", (0,), 0)


def test_bfloat16_gradients_are_added_up_in_float32() -> None:
    net, replicas = net_in_buckets(alone(), True, torch.bfloat16)
    total = [torch.zeros(p.shape) for p in net.parameters()]
    for m in range(8):
        single, _ = net_in_buckets(alone(), True, torch.bfloat16)
        for n in (net, single):
            n(inputs(0, m).bfloat16()).backward()
        for sum_, p in zip(total, single.parameters(), strict=True):
            sum_ += torch.zeros_like(sum_) if p.grad is None else p.grad
    replicas.end_sums()
    for sum_, p in zip(total, net.parameters(), strict=True):
        gradient = replicas.gradient(p)
        assert gradient is not None
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, sum_, rtol=1e-6, atol=1e-6)


def test_float32_parameters_of_one_rank_stay_as_they_are() -> None:
    net, replicas = net_in_buckets(alone(), True)
    assert replicas.buckets == []
    assert [replicas.updated_here(p) for p in net.parameters()] == [*net.parameters()]


def late_gradient() -> None:
    mesh = mesh_here()
    net, replicas = net_in_buckets(mesh.own_group("copies", "copies"), True)
    replicas_file.BUCKET = 1
    replicas.expect_last(True)
    net(inputs(mesh.rank, 0)).backward()
    replicas.end_sums()
    with pytest.raises(RuntimeError, match="after its sum over ranks had begun"):
        net(inputs(mesh.rank, 1)).backward()


def test_a_gradient_that_comes_too_late_is_an_error() -> None:
    run_on_ranks(late_gradient, 2)


def shares(costs: Sequence[float]) -> list[int]:
    """The owners of parameters of these costs."""
    mesh = mesh_here()
    parameters = [nn.Parameter(torch.zeros(n + 1)) for n in range(len(costs))]
    group = mesh.own_group("copies", "copies")
    replicas = make_replicas(dict(zip(parameters, costs, strict=True)), lambda _: group)
    owners = {r.parameter: r.owner for bucket in replicas.buckets for r in bucket.replicas}
    return [owners[parameter] for parameter in parameters]


def test_owners_share_the_costs_evenly() -> None:
    first, second = run_on_ranks(shares, 2, [8.0, 1.0, 2.0, 5.0])
    assert first == second == [0, 1, 1, 1]
