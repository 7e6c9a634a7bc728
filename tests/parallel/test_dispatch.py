"""The all-to-all dispatch against the local one over all ranks' tokens: outputs, every gradient, and how often a token travels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hybridtrain.model.moe import GroupedExperts, LocalDispatch
from hybridtrain.parallel.dispatch import AllToAllDispatch
from tests.parallel.groups import mesh_here
from tests.ranks import run_on_ranks

EXPERTS, DIM, HIDDEN = 8, 8, 4
TOKENS = (7, 0, 5, 3)  # by rank: rank 1 has none

Choice = Callable[[torch.Generator, int], Tensor]


def spread(generator: torch.Generator, tokens: int) -> Tensor:
    """Any three experts of the eight."""
    return torch.stack([torch.randperm(EXPERTS, generator=generator)[:3] for _ in range(tokens)] or [torch.empty(3)])[
        :tokens
    ].long()


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


CHOICES: list[Choice] = [spread, to_one_expert, to_one_rank, by_token, to_every_rank]


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


def check_dispatch(choice: Choice) -> None:
    mesh = mesh_here(ep=torch.distributed.get_world_size())
    size, rank = mesh.ep.size, mesh.rank
    each = EXPERTS // size

    parts = [inputs(i, choice) for i in range(size)]
    x, experts_NK, gates, grad = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    x, gates, whole = x.requires_grad_(), gates.requires_grad_(), experts_of(0, EXPERTS)
    expected = LocalDispatch()(x, experts_NK, gates, whole)
    expected.backward(grad)

    x_ND, experts_NK, gates_NK, grad_ND = parts[rank]
    x_ND, gates_NK, own = x_ND.requires_grad_(), gates_NK.requires_grad_(), experts_of(rank * each, each)
    y_ND = AllToAllDispatch(mesh.ep, EXPERTS)(x_ND, experts_NK, gates_NK, own)
    there = mesh.traffic.entries()["ep", "all_to_all"]
    y_ND.backward(grad_ND)
    and_back = mesh.traffic.entries()["ep", "all_to_all"]

    here = slice(sum(TOKENS[:rank]), sum(TOKENS[: rank + 1]))
    pairs = [("y", y_ND, expected[here]), ("x.grad", x_ND.grad, x.grad[here]), ("gates.grad", gates_NK.grad, gates.grad[here])]  # type: ignore[index]
    mine = slice(rank * each, (rank + 1) * each)
    pairs += [(n, p.grad, whole.get_parameter(n).grad[mine]) for n, p in own.named_parameters()]  # type: ignore[index]
    for name, ours, theirs in pairs:
        # float32 sums of at most 8 outputs, or of 15 tokens' gradients, in another order
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{choice.__name__} {n}: {text}")

    # a token is sent once to each rank that has any of its experts, and one row comes back
    owners = [part[1] // each for part in parts]
    sent = sum(len(set(token.tolist()) - {rank}) for token in owners[rank])
    received = sum(rank in token for i, tokens in enumerate(owners) if i != rank for token in tokens.tolist())
    k = experts_NK.shape[1]
    assert there == (5, (size - 1) * 8 + sent * (DIM * 4 + k * 4 + k * 8) + received * DIM * 4), choice.__name__
    assert and_back[0] == 8
    assert and_back[1] - there[1] == sent * DIM * 4 + received * (DIM * 4 + k * 4), choice.__name__


def check_all() -> None:
    for choice in CHOICES:
        check_dispatch(choice)


@pytest.mark.parametrize("size", [2, 4])
def test_equals_the_local_dispatch(size: int) -> None:
    run_on_ranks(check_all, size)


def repeat(times: int) -> bytes:
    mesh = mesh_here(ep=2)
    outs = []
    for _ in range(times):
        x_ND, experts_NK, gates_NK, grad_ND = inputs(mesh.rank, spread)
        own = experts_of(mesh.rank * 4, 4)
        y_ND = AllToAllDispatch(mesh.ep, EXPERTS)(x_ND.requires_grad_(), experts_NK, gates_NK, own)
        y_ND.backward(grad_ND)
        assert x_ND.grad is not None
        outs.append(y_ND.detach().numpy().tobytes() + x_ND.grad.numpy().tobytes())
    assert len(set(outs)) == 1
    return outs[0]


def test_is_bitwise_reproducible() -> None:
    assert run_on_ranks(repeat, 2, 3) == run_on_ranks(repeat, 2, 1)
