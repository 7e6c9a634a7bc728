"""The blocked cross-entropy against its definition: blocks, ignored targets, extreme logits, one backward."""

from __future__ import annotations

import pytest
import torch

from hybridtrain.kernels.cross_entropy import op, reference


@pytest.mark.parametrize(
    ("tokens", "vocab", "block"), [(1, 1, 8), (13, 11, 40), (13, 11, 5), (70, 300, 1 << 18)]
)
def test_op_equals_reference(tokens: int, vocab: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "BLOCK_ELEMENTS", block)
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(tokens, vocab, generator=generator)).requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=generator)
    targets[::4] = -100
    loss, expected = (
        op.cross_entropy_sum(logits, targets, -100),
        reference.cross_entropy_sum(logits, targets, -100),
    )
    torch.testing.assert_close(loss, expected)
    (got,) = torch.autograd.grad(0.3 * loss, logits)
    (wanted,) = torch.autograd.grad(0.3 * expected, logits)
    torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        torch.testing.assert_close(op.cross_entropy_sum(logits, targets, -100), expected)


def test_an_improbable_target_has_a_finite_loss() -> None:
    logits = torch.tensor([[500.0, -500.0, 0.0]], requires_grad=True)
    loss = op.cross_entropy_sum(logits, torch.tensor([1]), -100)
    assert loss.item() == 1000.0
    assert torch.autograd.grad(loss, logits)[0].tolist() == [[1.0, -1.0, 0.0]]


def test_a_second_backward_is_refused() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    loss = op.cross_entropy_sum(logits, torch.tensor([0, 1, 2]), -100)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        loss.backward()
