"""The Triton source of the short convolution, interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch

from hybridtrain.kernels.engram import reference
from hybridtrain.kernels.testing import check

kernel = pytest.importorskip(
    "hybridtrain.kernels.engram.short_conv_kernel", reason="needs triton", exc_type=ImportError
)


def swap(function):
    return lambda u, weight, taps, documents, dilation: function(u, weight, taps, documents, dilation, 1e-6)


@pytest.mark.parametrize(
    ("B", "T", "D", "J", "dilation"), [(1, 1, 60, 4, 3), (2, 63, 96, 4, 3), (1, 257, 100, 3, 2)]
)
@pytest.mark.parametrize("share", [None, 0.1, 1.0])  # of tokens that start a document
def test_short_conv(B: int, T: int, D: int, J: int, dilation: int, share: float | None) -> None:
    documents = None if share is None else (torch.rand(B, T) < share).cumsum(1)
    inputs = [torch.randn(B, T, D), torch.randn(D), torch.randn(J, D)]
    check(swap(kernel.short_conv), swap(reference.short_conv), inputs, documents, dilation)


def test_bfloat16_and_several_tiles_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridtrain.kernels.launch.MAX_PROGRAMS", 2)
    inputs = [torch.randn(shape).bfloat16() for shape in ((2, 40, 24), (24,), (4, 24))]
    check(swap(kernel.short_conv), swap(reference.short_conv), inputs, (torch.rand(2, 40) < 0.1).cumsum(1), 3)


def test_op_is_a_torch_op() -> None:
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((2, 5, 8), (8,), (4, 8))]
    torch.library.opcheck(kernel._op, (*inputs, None, 2, 1e-6))
    torch.library.opcheck(kernel._op, (*inputs, torch.zeros(2, 5, dtype=torch.int64), 2, 1e-6))
