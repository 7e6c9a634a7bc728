"""The permutation's hand-written gradients against autograd of the definition."""

from __future__ import annotations

import pytest
import torch

from hybridtrain.kernels.moe_swiglu.op import sort_by_expert
from hybridtrain.kernels.permute import op, reference


@pytest.mark.parametrize(
    ("tokens", "slots", "experts"), [(1, 1, 1), (7, 1, 3), (13, 2, 4), (9, 3, 40), (0, 2, 4)]
)
def test_op_equals_reference(tokens: int, slots: int, experts: int) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(tokens, experts, generator=generator).topk(slots).indices
    order, inverse, counts = sort_by_expert(chosen, experts)
    assert torch.equal(chosen.flatten()[order], chosen.flatten().sort().values)
    assert torch.equal(order[inverse.flatten()], torch.arange(tokens * slots))
    assert counts.tolist() == [(chosen == e).sum() for e in range(experts)]
    x = torch.randn(tokens, 5, generator=generator).requires_grad_()
    gates = torch.rand(tokens, slots, generator=generator).requires_grad_()
    scale, weights = (
        torch.randn(tokens * slots, 5, generator=generator),
        torch.randn(tokens, 5, generator=generator),
    )
    results = []
    for module in (op, reference):
        y = module.permute(x, order, inverse)
        out = module.combine((y * scale).sin(), gates, order, inverse)
        results.append((y, out, *torch.autograd.grad((out * weights).sum(), (x, gates))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("tokens", "slots", "experts", "ranks"), [(1, 1, 2, 2), (50, 4, 12, 3), (9, 2, 8, 1), (0, 2, 4, 2)]
)
def test_each_token_goes_once_to_each_of_its_ranks(tokens: int, slots: int, experts: int, ranks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(tokens, experts, generator=generator).topk(slots).indices
    chosen[::7] = -1
    chosen[3::7, :1] = experts
    order, inverse, asked = op.sort_by_destination(chosen, experts, ranks)
    sorted_ = reference.sort_by_destination(chosen, experts, ranks)
    assert all(torch.equal(a, b) for a, b in zip((order, inverse, asked), sorted_, strict=True))
    expected = []  # by hand: (rank, token, first choice there)
    for rank in range(ranks):
        for token, choice in enumerate(chosen.tolist()):
            there = [k for k, e in enumerate(choice) if e != -1 and e * ranks // experts == rank]
            expected += [(rank, token, there)] if there else []
    assert order.tolist() == [n * slots + k[0] for _, n, k in expected] + [-1] * (
        tokens * min(slots, ranks) - len(expected)
    )
    stands = {n * slots + k[0]: place for place, (_, n, k) in enumerate(expected)}
    assert inverse.flatten().tolist() == [stands.get(pair, -1) for pair in range(tokens * slots)]
    assert asked.tolist() == [
        [sum(e[0] == r for e in expected), sum(len(e[2]) for e in expected if e[0] == r)]
        for r in range(ranks)
    ]
    if tokens:
        order = order[: len(expected)]
        x = torch.randn(tokens, 3, generator=generator)
        assert torch.equal(op.spread(x, order, inverse), x[[n for _, n, _ in expected]])
        visits = torch.tensor([sum(n == token for _, n, _ in expected) for token in range(tokens)])
        torch.testing.assert_close(
            op.collect(op.spread(x, order, inverse), order, inverse), x * visits[:, None]
        )


def test_bfloat16_rows_are_added_up_in_float32_and_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(64, 8, generator=generator).argsort(-1)  # every token goes to all experts
    order, inverse, _ = sort_by_expert(chosen, 8)
    y, gates = torch.randn(512, 16, generator=generator).bfloat16(), torch.rand(64, 8, generator=generator)
    x = torch.zeros(64, 16, dtype=torch.bfloat16, requires_grad=True)
    sums = y.double()[inverse].sum(1)
    weighted = (y.double()[inverse] * gates.double()[:, :, None]).sum(1)
    found = [
        (op.collect(y, order, inverse), sums),
        (op.combine(y, gates, order, inverse), weighted),
        (torch.autograd.grad(op.permute(x, order, inverse), x, y)[0], sums),
        (torch.autograd.grad(op.spread(x, order, inverse), x, y)[0], sums),
    ]
    for ours, exact in found:
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), exact, rtol=2.0**-8, atol=1e-5)
