"""The blocked head-and-loss against its definition: blocks, ignored targets, extreme logits, no gradient
wanted.
"""

from __future__ import annotations

import pytest
import torch

from hybridtrain.kernels.linear_cross_entropy import op, reference


@pytest.mark.parametrize(("tokens", "vocab", "rows"), [(1, 1, 8), (13, 11, 5), (13, 11, 13), (64, 300, 7)])
def test_op_equals_reference(tokens: int, vocab: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(op, "MIN_ROWS", rows)
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, 6, generator=generator).requires_grad_()
    weight = torch.randn(vocab, 6, generator=generator).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[1::4] = -100
    loss, expected = (m.linear_cross_entropy_sum(h, weight, targets, -100) for m in (op, reference))
    torch.testing.assert_close(loss, expected)
    for a, b in zip(
        torch.autograd.grad(0.3 * loss, (h, weight)),
        torch.autograd.grad(0.3 * expected, (h, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(op.linear_cross_entropy_sum(h, weight, targets, -100), expected)


def test_an_improbable_target_has_a_finite_loss() -> None:
    h, weight = torch.ones(1, 1, requires_grad=True), torch.tensor([[500.0], [-500.0]])
    assert op.linear_cross_entropy_sum(h, weight, torch.tensor([1]), -100).item() == 1000.0
