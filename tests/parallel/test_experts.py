"""The all-to-all dispatch against the local one over all ranks' tokens: outputs, every gradient, and how
often a token travels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridtrain.kernels.choose import TORCH, Backends
from hybridtrain.model.exchanges import local_dispatch
from hybridtrain.model.feedforwards.moe import DROPPED, GroupedExperts, MoESettings, Router
from hybridtrain.parallel import collectives
from hybridtrain.parallel.experts import AllToAllDispatch, DispatchMemoryError, ExpertExchange, Hop
from tests.parallel.groups import mesh_here
from tests.ranks import run_on_ranks

EXPERTS, DIM, HIDDEN = 8, 8, 4
TOKENS = (7, 0, 5, 3)  # by rank: rank 1 has none

Choice = Callable[[torch.Generator, int], Tensor]


def spread(generator: torch.Generator, tokens: int) -> Tensor:
    """Any three experts of the eight."""
    return torch.stack(
        [torch.randperm(EXPERTS, generator=generator)[:3] for _ in range(tokens)] or [torch.empty(3)]
    )[:tokens].long()


def to_one_expert(generator: torch.Generator, tokens: int) -> Tensor:
    """Every token of every rank goes to expert 5 alone."""
    return torch.full((tokens, 1), 5)


def to_one_rank(generator: torch.Generator, tokens: int) -> Tensor:
    """Both experts of every token live on the last rank."""
    return torch.tensor([[EXPERTS - 1, EXPERTS - 2]]).repeat(tokens, 1)


def by_token(generator: torch.Generator, tokens: int) -> Tensor:
    """Both experts of a token on one rank, a different one for each token."""
    first = torch.randint(EXPERTS // 2, (tokens, 1), generator=generator) * 2
    return torch.cat([first, first + 1], 1)


def to_every_rank(generator: torch.Generator, tokens: int) -> Tensor:
    """A token's experts are all over the ranks."""
    return torch.arange(EXPERTS).repeat(tokens, 1)


def partly_dropped(generator: torch.Generator, tokens: int) -> Tensor:
    """Every other pair is dropped, of some tokens all."""
    experts_NK = spread(generator, tokens)
    return experts_NK.where(torch.rand(experts_NK.shape, generator=generator) < 0.5, DROPPED)


def all_dropped(generator: torch.Generator, tokens: int) -> Tensor:
    return torch.full((tokens, 2), DROPPED)


CHOICES: list[Choice] = [
    spread,
    to_one_expert,
    to_one_rank,
    by_token,
    to_every_rank,
    partly_dropped,
    all_dropped,
]


def experts_of(first: int, count: int) -> GroupedExperts:
    """Experts `first` to `first + count - 1` of the whole set."""
    part = GroupedExperts(count, DIM, HIDDEN)
    generator = torch.Generator().manual_seed(0)
    for weight in part.parameters():
        whole = torch.randn((EXPERTS, *weight.shape[1:]), generator=generator)
        weight.data = whole[first : first + count].clone()
    return part


def inputs(rank: int, choice: Choice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, experts, gates and the gradient of the output, of one rank."""
    generator = torch.Generator().manual_seed(rank)
    experts_NK = choice(generator, TOKENS[rank])
    x_ND, grad_ND = (torch.randn(TOKENS[rank], DIM, generator=generator) for _ in range(2))
    return x_ND, experts_NK, torch.rand(experts_NK.shape, generator=generator), grad_ND


def rows_of_a_hop(wanted: list[list[set[int]]], size: int, rank: int) -> tuple[int, int]:
    """Rows that `rank` of a group sends to others and gets from them; `wanted[i]`: for each token at rank i,
    where it goes.
    """
    sent = sum(len(token - {rank}) for token in wanted[rank])
    received = sum(rank in token for i in range(size) if i != rank for token in wanted[i])
    return sent, received


def expected_rows(experts: list[Tensor], each: int, node_size: int, rank: int) -> dict[str, tuple[int, int]]:
    """By group, the rows that `rank` sends and gets: each token once per rank, or once per node and from
    there once per rank.
    """
    world = len(experts)
    owners = [[{e // each for e in token if e != DROPPED} for token in part.tolist()] for part in experts]
    if not node_size:
        return {"ep": rows_of_a_hop(owners, world, rank)}
    nodes, (node, index) = world // node_size, divmod(rank, node_size)
    across = [
        [{o // node_size for o in token} for token in owners[n * node_size + index]] for n in range(nodes)
    ]
    inside = [
        [
            on_node
            for n in range(nodes)
            for token in owners[n * node_size + i]
            if (on_node := {o % node_size for o in token if o // node_size == node})
        ]
        for i in range(node_size)
    ]
    rows = {"ep_inter": rows_of_a_hop(across, nodes, node)}
    return rows | ({"ep_intra": rows_of_a_hop(inside, node_size, index)} if node_size > 1 else {})


def check_dispatch(choice: Choice, node_size: int, backends: Backends = TORCH) -> None:
    mesh = mesh_here(ep=torch.distributed.get_world_size(), node_size=node_size)
    size, rank = mesh.ep.size, mesh.rank
    each = EXPERTS // size

    parts = [inputs(i, choice) for i in range(size)]
    x, experts_NK, gates, grad = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    x, gates, whole = x.requires_grad_(), gates.requires_grad_(), experts_of(0, EXPERTS)
    expected = local_dispatch(EXPERTS, DROPPED in experts_NK, "")(x, experts_NK, gates, whole)()
    expected.backward(grad)

    x_ND, experts_NK, gates_NK, grad_ND = parts[rank]
    x_ND, gates_NK, own = x_ND.requires_grad_(), gates_NK.requires_grad_(), experts_of(rank * each, each)
    dispatch = AllToAllDispatch(mesh.ep_levels, EXPERTS, backends=backends)
    y_ND = dispatch(x_ND, experts_NK, gates_NK, own)()
    there = mesh.traffic.entries()
    y_ND.backward(grad_ND)
    and_back = mesh.traffic.entries()

    here = slice(sum(TOKENS[:rank]), sum(TOKENS[: rank + 1]))
    pairs = [
        ("y", y_ND, expected[here]),
        ("x.grad", x_ND.grad, x.grad[here]),
        ("gates.grad", gates_NK.grad, gates.grad[here]),
    ]  # type: ignore[index]
    mine = slice(rank * each, (rank + 1) * each)
    pairs += [(n, p.grad, whole.get_parameter(n).grad[mine]) for n, p in own.named_parameters()]  # type: ignore[index]
    for name, ours, theirs in pairs:
        # float32 sums of at most 8 outputs, or of 15 tokens' gradients, in another order
        torch.testing.assert_close(
            ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{choice.__name__} {n}: {text}"
        )
    assert bool((gates_NK.grad[experts_NK == DROPPED] == 0).all())  # type: ignore[index]

    # counts of tokens and pairs; a token with its gates and expert numbers to each place that has any of its
    # experts; one row back
    k = experts_NK.shape[1]
    rows = expected_rows([part[1] for part in parts], each, node_size, rank)
    assert {group for group, _ in there} == rows.keys()
    for group, (sent, received) in rows.items():
        others = (size if group == "ep" else node_size if group == "ep_intra" else size // node_size) - 1
        forward, both = there[group, "all_to_all"], and_back[group, "all_to_all"]
        chosen = k * 4 + k * 4  # gates and expert numbers in one row
        assert forward == (4, others * 16 + sent * (DIM * 4 + chosen) + received * DIM * 4), (
            choice.__name__,
            group,
        )
        assert both[0] == 7
        assert both[1] - forward[1] == sent * DIM * 4 + received * (DIM * 4 + chosen), (
            choice.__name__,
            group,
        )


def check_all(node_sizes: list[int]) -> None:
    for node_size in node_sizes:
        for choice in CHOICES:
            check_dispatch(choice, node_size)
        if importlib.util.find_spec("triton") is not None:
            check_dispatch(partly_dropped, node_size, Backends({"permute": "triton"}))


@pytest.mark.parametrize(("size", "node_sizes"), [(2, [0, 1]), (4, [0, 1, 2])])
def test_equals_the_local_dispatch(size: int, node_sizes: list[int]) -> None:
    run_on_ranks(check_all, size, node_sizes)


def check_group_limits(node_size: int, top_k: int, most: int) -> None:
    """With 4 groups of 2 experts over 4 ranks: how many nodes a token visits, with the limit and without."""
    mesh = mesh_here(ep=4, node_size=node_size)
    visits = []
    for limit in ({"num_groups": 4, "top_groups": most}, {}):
        torch.manual_seed(mesh.rank)
        router = Router(DIM, MoESettings(num_experts=EXPERTS, top_k=top_k, **limit), tokens_per_step=64)
        torch.nn.init.normal_(router.weight)
        x_ND = torch.randn(64, DIM)
        experts_NK, gates_NK = router(x_ND)
        trip = ExpertExchange.dispatch(Hop(mesh.ep_levels[0], EXPERTS, "MoE", 0), x_ND, experts_NK, gates_NK)
        trip.arrive()
        visits.append(int(torch.bincount(trip.order_P // top_k).max()))
    assert visits == [most, min(top_k, 4 // node_size)]


def repeat(times: int, node_size: int) -> bytes:
    mesh = mesh_here(ep=2, node_size=node_size)
    outs = []
    for _ in range(times):
        x_ND, experts_NK, gates_NK, grad_ND = inputs(mesh.rank, spread)
        own = experts_of(mesh.rank * 4, 4)
        y_ND = AllToAllDispatch(mesh.ep_levels, EXPERTS)(x_ND.requires_grad_(), experts_NK, gates_NK, own)()
        y_ND.backward(grad_ND)
        assert x_ND.grad is not None
        outs.append(y_ND.detach().numpy().tobytes() + x_ND.grad.numpy().tobytes())
    assert len(set(outs)) == 1
    return outs[0]


def test_is_bitwise_reproducible() -> None:
    assert run_on_ranks(repeat, 2, 3, 0) == run_on_ranks(repeat, 2, 1, 1)


class Watched:
    """An exchange under way that notes when it is waited for."""

    def __init__(self, work: Any, events: list[str]) -> None:
        self.work, self.events = work, events

    def is_completed(self) -> bool:
        return bool(self.work.is_completed())

    def wait(self) -> None:
        self.events.append("wait")
        self.work.wait()


class Shared(torch.autograd.Function):
    """Stands for shared experts, and notes when they run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, events: list[str]) -> Tensor:
        ctx.events = events
        events.append("shared")
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.events.append("shared backward")
        return grads[0] * 2, None


def run_beside_shared(mesh: Any, events: list[str], overlapped: bool) -> list[Tensor]:
    x_ND, experts_NK, gates_NK, grad_ND = inputs(mesh.rank, spread)
    x_ND, gates_NK, own = x_ND.requires_grad_(), gates_NK.requires_grad_(), experts_of(mesh.rank * 4, 4)
    finish = AllToAllDispatch(mesh.ep_levels, EXPERTS)(x_ND, experts_NK, gates_NK, own)
    if overlapped:
        shared_ND: Tensor = Shared.apply(x_ND, events)  # type: ignore[no-untyped-call]
        y_ND = finish()
    else:
        y_ND = finish()
        shared_ND = Shared.apply(x_ND, events)  # type: ignore[no-untyped-call]
    (y_ND + shared_ND).backward(grad_ND)
    assert x_ND.grad is not None
    assert gates_NK.grad is not None
    return [
        y_ND + shared_ND,
        x_ND.grad,
        gates_NK.grad,
        *(p.grad for p in own.parameters() if p.grad is not None),
    ]


def check_overlap() -> None:
    real, events = torch.distributed.all_to_all_single, list[str]()

    def watched(out: Tensor, x: Tensor, *rest: Any, **named: Any) -> Watched:
        events.append("begin")
        return Watched(real(out, x, *rest, **named), events)

    collectives.dist.all_to_all_single = watched  # type: ignore[assignment]
    mesh = mesh_here(ep=2)
    one = run_beside_shared(mesh, events, overlapped=True)
    # counts are waited for; gates with expert numbers, and tokens, travel while the shared experts run; then
    # the results come back
    counts, gates_and_tokens, back = ["begin", "wait"], ["begin"] * 2, ["begin", "wait"]
    assert events[:9] == [*counts, *gates_and_tokens, "shared", "wait", "wait", *back]
    # backward: the gradients of tokens and gates are on their way when the shared experts' backward runs
    backward = events[9:]
    assert backward.index("shared backward") > [i for i, e in enumerate(backward) if e == "begin"][-1]
    assert backward[backward.index("shared backward") :] == ["shared backward", "wait", "wait"]
    two = run_beside_shared(mesh, events, overlapped=False)
    assert len(one) == len(two) == 6
    for ours, theirs in zip(one, two, strict=True):
        assert torch.equal(ours, theirs)


def check_memory_errors() -> None:
    """An allocation fails on the way there, in the experts, on the way back; on both ranks at once, so that
    none waits.
    """
    mesh, real = mesh_here(ep=2), collectives.launch_all_to_all
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    tokens = sum(TOKENS[:2]) if mesh.rank == 1 else 0  # all go to rank 1
    even = 2 * TOKENS[mesh.rank]
    times = f"{2 * tokens / even:.1f} times " if even else ""
    said = (
        f"layers.3.feedforward: rank {mesh.rank} ran out of memory in the exchange over ep: it received "
        f"{tokens} tokens for {2 * tokens} token-expert pairs, {times}the even share of {even}; bound it by "
        "model.moe.capacity "
    )
    seen: list[int] = []

    def failing_at(place: int) -> Callable[..., Any]:
        def begin(x: Tensor, *rest: Any) -> Any:
            if x.is_floating_point() and x.size(1) == DIM:
                seen.append(place)
                if len(seen) == place:
                    raise out_of_memory
            return real(x, *rest)

        return begin

    def run(experts: Any) -> None:
        x_ND, experts_NK, gates_NK, grad_ND = inputs(mesh.rank, to_one_rank)
        dispatch = AllToAllDispatch(mesh.ep_levels, EXPERTS, "layers.3.feedforward")
        dispatch(x_ND.requires_grad_(), experts_NK, gates_NK.requires_grad_(), experts)().backward(grad_ND)

    def too_large(*_: Any, **__: Any) -> Tensor:
        return torch.empty(1 << 46)

    def wrong(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("not about memory")

    own = experts_of(mesh.rank * 4, 4)
    for place in (1, 2, 3, 4):  # tokens there, results back, and in the backward pass their gradients
        seen.clear()
        collectives.launch_all_to_all = failing_at(place)  # type: ignore[assignment]
        with pytest.raises(DispatchMemoryError) as caught:
            run(own)
        assert str(caught.value).startswith(said)
        assert str(caught.value).endswith(
            "(OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.)"
        )
        assert len(seen) == place
    collectives.launch_all_to_all = real
    with pytest.raises(DispatchMemoryError) as caught:
        run(too_large)
    assert str(caught.value).startswith(said)
    assert "can't allocate memory: you tried to allocate 281474976710656 bytes" in str(caught.value)
    with pytest.raises(RuntimeError, match=r"^not about memory$"):
        run(wrong)


def check_in_one_spawn() -> None:
    check_overlap()
    check_memory_errors()


def test_shared_experts_run_while_tokens_travel_and_memory_errors_explain_themselves() -> None:
    run_on_ranks(check_in_one_spawn, 2)


def check_limits() -> None:
    for node_size, top_k, most in ((2, 2, 1), (1, 3, 2)):
        check_group_limits(node_size, top_k, most)


def test_group_limits_bound_the_nodes_that_a_token_visits() -> None:
    run_on_ranks(check_limits, 4)
