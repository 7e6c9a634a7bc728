"""The Triton source of the grouped products, interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch

from hybridtrain.kernels.grouped_mlp import reference
from hybridtrain.kernels.testing import check

kernel = pytest.importorskip(
    "hybridtrain.kernels.grouped_mlp.kernel", reason="needs triton", exc_type=ImportError
)

COUNTS = {
    "uneven": [5, 1, 40, 17],
    "empty experts": [0, 63, 0, 0],
    "one row": [0, 0, 1, 0],
    "large": [130, 0, 127],
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_swiglu(counts: list[int], dtype: torch.dtype) -> None:
    P, E, D, F = sum(counts), len(counts), 60, 100
    x = torch.randn(P, D)
    weights = [torch.randn(shape) / 8 for shape in ((E, D, F), (E, D, F), (E, F, D))]
    counts_E = torch.tensor(counts)
    check(
        lambda x, *w: kernel.grouped_swiglu(x, counts_E, *w),
        lambda x, *w: reference.grouped_swiglu(x, counts_E, *w),
        [t.to(dtype) for t in (x, *weights)],
    )


def test_no_rows_at_all() -> None:
    x, w = torch.randn(0, 8, requires_grad=True), torch.randn(2, 8, 12, requires_grad=True)
    out = kernel.grouped_product(x, w, torch.tensor([0, 0]))
    assert out.shape == (0, 12)
    assert torch.equal(torch.autograd.grad(out.sum(), w)[0], torch.zeros(2, 8, 12))


def test_op_is_a_torch_op() -> None:
    a, w, counts = (
        torch.randn(9, 8, requires_grad=True),
        torch.randn(3, 8, 12, requires_grad=True),
        torch.tensor([4, 0, 5]),
    )
    torch.library.opcheck(kernel._op, (a, w, counts, False))
    torch.library.opcheck(kernel._op, (a, torch.randn(3, 12, 8, requires_grad=True), counts, True))
