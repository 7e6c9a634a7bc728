"""The gate and the short convolution by torch, output and gradients against their definitions."""

from __future__ import annotations

import pytest
import torch

from hybridtrain.kernels.engram import op, reference
from hybridtrain.kernels.testing import check


@pytest.mark.parametrize("branches", [None, 1, 3])
def test_the_gate_equals_its_definition(branches: int | None) -> None:
    inner = () if branches is None else (branches,)
    shapes = [(2, 7, *inner, 12), (2, 7, *inner, 12), (2, 7, 12), (*inner, 12), (*inner, 12)]

    def definition(h, k, v, w, z):
        flat = (
            h.reshape(14, -1, 12),
            k.reshape(14, -1, 12),
            v.reshape(14, 12),
            w.view(-1, 12),
            z.view(-1, 12),
        )
        return reference.engram_gate(*flat, 1e-6, 0.25)[0].reshape(h.shape)

    fused = lambda h, k, v, w, z: op.engram_gate(h, k, v, op.GateNorms(w, z, 1e-6, 0.25))[0]  # noqa: E731
    check(fused, definition, [torch.randn(shape) for shape in shapes])


def test_gates_have_no_gradient_and_a_place_for_each_branch() -> None:
    h, k, v, weight = (
        torch.randn(2, 5, 3, 8, requires_grad=True),
        torch.randn(2, 5, 3, 8),
        torch.randn(2, 5, 8),
        torch.ones(3, 8),
    )
    _, gates = op.engram_gate(h, k, v, op.GateNorms(weight, weight, 1e-6, 0.01))
    assert gates.shape == (2, 5, 3, 1)
    assert not gates.requires_grad
    flat = (x.flatten(0, 1) for x in (h, k, v))
    torch.testing.assert_close(
        gates.flatten(0, 1)[..., 0], reference.engram_gate(*flat, weight, weight, 1e-6, 0.01)[1]
    )


@pytest.mark.parametrize("share", [None, 0.2, 1.0])  # of tokens that start a document
@pytest.mark.parametrize("tokens", [1, 2, 40])  # the taps reach over 9
def test_the_convolution_equals_its_definition(tokens: int, share: float | None) -> None:
    documents = None if share is None else (torch.rand(2, tokens) < share).cumsum(1)
    inputs = [torch.randn(2, tokens, 12), torch.randn(12), torch.randn(4, 12)]
    check(
        lambda *x: op.short_conv(*x, documents, op.ConvRule(3, 1e-6)),
        lambda *x: reference.short_conv(*x, documents, 3, 1e-6),
        inputs,
    )
