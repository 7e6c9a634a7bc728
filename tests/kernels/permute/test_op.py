"""The permutation's hand-written gradients against autograd of the definition."""

from __future__ import annotations

import pytest
import torch

from hybridtrain.kernels.permute import op, reference


@pytest.mark.parametrize(("tokens", "slots", "experts"), [(1, 1, 1), (7, 1, 3), (13, 2, 4), (9, 3, 40), (0, 2, 4)])
def test_op_equals_reference(tokens: int, slots: int, experts: int) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(tokens, experts, generator=generator).topk(slots).indices
    order, inverse, counts = op.sort_by_expert(chosen, experts)
    assert torch.equal(chosen.flatten()[order], chosen.flatten().sort().values)
    assert torch.equal(order[inverse.flatten()], torch.arange(tokens * slots))
    assert counts.tolist() == [(chosen == e).sum() for e in range(experts)]
    x = torch.randn(tokens, 5, generator=generator).requires_grad_()
    gates = torch.rand(tokens, slots, generator=generator).requires_grad_()
    scale, weights = torch.randn(tokens * slots, 5, generator=generator), torch.randn(tokens, 5, generator=generator)
    results = []
    for module in (op, reference):
        y = module.permute(x, order, inverse)
        out = module.combine((y * scale).sin(), gates, order, inverse)
        results.append((y, out, *torch.autograd.grad((out * weights).sum(), (x, gates))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
