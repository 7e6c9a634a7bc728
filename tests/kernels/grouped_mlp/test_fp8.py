"""Grouped products of FP8 operands, interpreted on the CPU: the operands bit for bit, the products within the
stated bounds.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from hybridtrain.kernels.grouped_mlp import reference
from hybridtrain.kernels.testing import poisoned

fp8 = pytest.importorskip("hybridtrain.kernels.grouped_mlp.fp8", reason="needs triton", exc_type=ImportError)

compiled = os.environ["TRITON_INTERPRET"] == "0" and torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    compiled and torch.cuda.get_device_capability() < (8, 9), reason="needs compute capability 8.9"
)

COUNTS = {
    "uneven": [5, 1, 40, 17],
    "empty experts": [0, 63, 0, 0],
    "one row": [0, 0, 1, 0],
    "large": [130, 0, 127],
}
RMS = 0.05  # README.md: of the product's own root mean square, for normally distributed operands


def equal(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0].view(torch.uint8), b[0].view(torch.uint8)) and torch.equal(a[1], b[1])


@pytest.mark.parametrize(("R", "C"), [(1, 60), (63, 96), (40, 100), (5, 1300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operands_are_bit_exact(R: int, C: int, dtype: torch.dtype) -> None:
    x = (torch.randn(2, R, C) * torch.logspace(-6, 6, R)[None, :, None]).to(dtype)
    x[1, 0] = 0
    with poisoned():
        rows, columns = fp8.quantise(x), fp8.quantise(x.transpose(1, 2).contiguous(), columns=True)
    for e in range(2):
        assert equal((rows[0][e], rows[1][e]), reference.quantise(x[e]))
    assert equal(rows, columns)
    assert rows[1][1, 0] == 1
    assert (rows[0].float().abs().amax(-1)[0] == 448).all()


def slack(x: Tensor) -> Tensor:
    """How far an element of a row may be from itself in FP8: 3 bits of mantissa, and a least step of 2^-9
    under the scale.
    """
    return x.abs() * 2**-4 + x.abs().amax(-1, keepdim=True) / 448 * 2**-10


def bound(a: Tensor, w: Tensor) -> Tensor:
    """On the error of a @ w with both operands in FP8, a by rows and w by columns, and float32 sums."""
    da, dw = slack(a), slack(w.T).T
    return da @ w.abs() + a.abs() @ dw + da @ dw + 1e-5 * (a.abs() @ w.abs())


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_within_the_bounds(counts: list[int], dtype: torch.dtype) -> None:
    P, E, K, N = sum(counts), len(counts), 60, 100
    a, w, grad = (torch.randn(shape).to(dtype) for shape in ((P, K), (E, K, N), (P, N)))
    counts_E = torch.tensor(counts)
    leaves = a.requires_grad_(), w.requires_grad_()
    with poisoned():
        out = fp8._op(a, *fp8._op_rows(a.detach()), w, counts_E)
        grad_a, grad_w = torch.autograd.grad(out, leaves, grad)
    a, w, grad = a.detach().double(), w.detach().double(), grad.double()
    rounding = torch.finfo(dtype).eps
    for e, (x, g) in enumerate(zip(a.split(counts), grad.split(counts), strict=True)):
        rows = slice(sum(counts[:e]), sum(counts[: e + 1]))
        for mine, left, right in ((out[rows], x, w[e]), (grad_a[rows], g, w[e].T)):
            exact = left @ right
            error = (mine.double() - exact).abs()
            assert (error <= bound(left, right) + rounding * (exact.abs() + error)).all()
            assert error.square().sum() <= (RMS + rounding) ** 2 * exact.square().sum() + 1e-30
        exact = x.T @ g  # not in FP8
        assert (grad_w[e].double() - exact).abs().max() <= max(rounding, 1e-6) * 4 * exact.abs().max()


def test_swiglu_of_experts() -> None:
    counts, D, F = [5, 0, 40, 18], 96, 60
    x, *weights = (torch.randn(s) / s[1] ** 0.5 for s in ((63, D), (4, D, F), (4, D, F), (4, F, D)))
    wanted, got = ([t.clone().requires_grad_() for t in (x, *weights)] for _ in range(2))
    exact = reference.grouped_swiglu(wanted[0], torch.tensor(counts), *wanted[1:])
    with poisoned():
        out = fp8.grouped_swiglu(got[0], torch.tensor(counts), *got[1:])
    grad = torch.randn(63, D)
    pairs = [
        (out, exact),
        *zip(
            *(torch.autograd.grad(o, leaves, grad) for o, leaves in ((out, got), (exact, wanted))),
            strict=True,
        ),
    ]
    for mine, true in pairs:
        assert (mine - true).norm() <= 2 * RMS * true.norm()  # of two or three products one after the other
        assert (mine - true).norm() >= 0.005 * true.norm()  # it is FP8 indeed


def test_ops_are_torch_ops() -> None:
    a, w, counts = (
        torch.randn(9, 16, requires_grad=True),
        torch.randn(3, 16, 12, requires_grad=True),
        torch.tensor([4, 0, 5]),
    )
    rows = fp8._op_rows(a.detach())
    for op, inputs in ((fp8._op_rows, (a.detach(),)), (fp8._op, (a, *rows, w, counts))):
        torch.library.opcheck(op, inputs)
    out = fp8.grouped_swiglu(
        a.to("meta"), counts.to("meta"), w.to("meta"), w.to("meta"), w.transpose(1, 2).to("meta")
    )
    assert out.shape == a.shape
    compiled = torch.compile(fp8.grouped_swiglu, fullgraph=True, backend="aot_eager")
    arguments = a, counts, w, w, w.transpose(1, 2).contiguous()
    assert torch.equal(compiled(*arguments), fp8.grouped_swiglu(*arguments))
