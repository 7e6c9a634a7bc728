"""The Triton source of attention over depth, interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch

from hybridtrain.kernels.depth_attention import reference
from hybridtrain.kernels.testing import check

kernel = pytest.importorskip(
    "hybridtrain.kernels.depth_attention.kernel", reason="needs triton", exc_type=ImportError
)


@pytest.mark.parametrize(
    ("N", "H", "G", "S", "C"), [(1, 4, 2, 2, 60), (7, 6, 2, 9, 96), (3, 2, 1, 33, 100), (2, 8, 1, 3, 256)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_depth_attention(N: int, H: int, G: int, S: int, C: int, dtype: torch.dtype) -> None:
    inputs = [torch.randn(shape).to(dtype) for shape in ((N, H, C), (N, S, G, C), (N, S, G, C))]
    check(kernel.depth_attention, reference.depth_attention, inputs, C**-0.5)


def test_slots_of_a_preallocated_buffer() -> None:
    buffer = torch.randn(2, 9, 12, 2, 16)  # keys and values of up to 12 slots
    q, k, v = torch.randn(9, 4, 16), buffer[0, :, :5], buffer[1, :, :5]
    for mine, plain in zip(
        kernel.depth_attention(q, k, v, 0.25), reference.depth_attention(q, k, v, 0.25), strict=True
    ):
        torch.testing.assert_close(mine, plain)


def parts(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots in two attentions, merged: the first stands for what the sequence attention gives."""
    first = reference.depth_attention(q, k[:, :4], v[:, :4], 0.25)
    return reference.merge(*first, *kernel.depth_attention(q, k[:, 4:], v[:, 4:], 0.25))


def test_merges_under_one_softmax() -> None:
    inputs = [torch.randn(shape) for shape in ((9, 4, 16), (9, 7, 2, 16), (9, 7, 2, 16))]
    check(parts, lambda q, k, v: reference.depth_attention(q, k, v, 0.25), inputs)


def test_gradients_given_the_global_log_sum_exp() -> None:
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in ((9, 4, 16), (9, 7, 2, 16), (9, 7, 2, 16)))
    out, lse = reference.depth_attention(q, k, v, 0.25)
    grad = torch.randn_like(out)
    wanted = torch.autograd.grad(out, (q, k, v), grad)
    delta = (grad * out).sum(-1).detach()
    halves = [
        kernel.depth_gradients(
            grad, q.detach(), *(x.detach()[:, part] for x in (k, v)), lse.detach(), delta, 0.25
        )
        for part in (slice(0, 4), slice(4, 7))
    ]
    torch.testing.assert_close(halves[0][0] + halves[1][0], wanted[0])
    for i in (1, 2):
        torch.testing.assert_close(torch.cat([half[i] for half in halves], 1), wanted[i])


def test_op_is_a_torch_op_and_refuses_what_does_not_fit() -> None:
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in ((3, 4, 8), (3, 5, 2, 8), (3, 5, 2, 8)))
    torch.library.opcheck(kernel._op, (q, k, v, 0.3))
    with pytest.raises(ValueError, match=r"q \[3, 4, 8\], k \[3, 5, 3, 8\] .* H a multiple of G"):
        kernel.depth_attention(q, torch.randn(3, 5, 3, 8), torch.randn(3, 5, 3, 8), 0.3)
