"""The Triton source of the memory's gate, interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch

from hybridtrain.kernels.engram import reference
from hybridtrain.kernels.testing import check

kernel = pytest.importorskip(
    "hybridtrain.kernels.engram.engram_gate_kernel", reason="needs triton", exc_type=ImportError
)


def inputs(N: int, M: int, D: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(shape).to(dtype) for shape in ((N, M, D), (N, M, D), (N, D), (M, D), (M, D))]


@pytest.mark.parametrize(("N", "M", "D"), [(1, 1, 60), (63, 4, 96), (257, 1, 100), (0, 1, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate(N: int, M: int, D: int, dtype: torch.dtype) -> None:
    check(kernel.engram_gate, reference.engram_gate, inputs(N, M, D, dtype), 1e-6, 0.01)


def test_gates() -> None:
    tensors = inputs(9, 2, 24)
    torch.testing.assert_close(
        kernel.engram_gate(*tensors, 1e-6, 1e-6)[1], reference.engram_gate(*tensors, 1e-6, 1e-6)[1]
    )


def test_no_agreement_at_all_has_no_slope() -> None:
    h, k, v, *weights = inputs(3, 1, 16)
    h = torch.zeros_like(h).requires_grad_()
    out, g = kernel.engram_gate(h, k, v, *weights, 1e-6, 1e-6)
    assert (g == 0.5).all()
    assert torch.equal(torch.autograd.grad(out.sum(), h)[0], torch.zeros_like(h))


def test_a_program_sums_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridtrain.kernels.launch.MAX_PROGRAMS", 2)
    check(kernel.engram_gate, reference.engram_gate, inputs(257, 2, 60), 1e-6, 0.01)


def test_op_is_a_torch_op_and_refuses_what_does_not_fit() -> None:
    torch.library.opcheck(kernel._op, (*(x.requires_grad_() for x in inputs(3, 2, 8)), 1e-6, 0.01))
    with pytest.raises(ValueError, match=r"must be \[N, M, D\] twice, \[N, D\] and \[M, D\] twice"):
        kernel.engram_gate(*inputs(3, 2, 8)[:3], torch.ones(8), torch.ones(2, 8), 1e-6, 0.01)
