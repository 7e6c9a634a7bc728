"""The grouped SwiGLU against its definition, with empty experts."""

from __future__ import annotations

import pytest
import torch

from hybridtrain.kernels.grouped_mlp import op, reference


@pytest.mark.parametrize("counts", [[5], [0, 7, 1], [3, 0, 0], [0, 0, 0], [40, 1, 30, 0, 9]])
def test_op_equals_reference(counts: list[int]) -> None:
    experts, dim, hidden = len(counts), 8, 12
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), dim, generator=generator).requires_grad_()
    w_gate, w_up = (torch.randn(experts, dim, hidden, generator=generator).requires_grad_() for _ in range(2))
    w_down = torch.randn(experts, hidden, dim, generator=generator).requires_grad_()
    weights = torch.randn(sum(counts), dim, generator=generator)
    results = []
    for function in (op.grouped_swiglu, reference.grouped_swiglu):
        out = function(x, torch.tensor(counts), w_gate, w_up, w_down)
        results.append((out, *torch.autograd.grad((out * weights).sum(), (x, w_gate, w_up, w_down))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_odd_widths_are_refused_by_name() -> None:
    w = torch.randn(1, 8, 6)
    with pytest.raises(
        ValueError, match=r"multiples of 4 in torch\.float32; got model width 8 and expert width 6"
    ):
        op.grouped_swiglu(torch.randn(2, 8), torch.tensor([2]), w, w, w.transpose(1, 2))
