"""The Triton source of RMSNorm, interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch

from hybridtrain.kernels.norms import reference
from hybridtrain.kernels.testing import check

kernel = pytest.importorskip(
    "hybridtrain.kernels.norms.rms_norm_kernel", reason="needs triton", exc_type=ImportError
)


@pytest.mark.parametrize(("N", "D"), [(1, 60), (63, 96), (257, 100), (40, 16), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(N: int, D: int, dtype: torch.dtype) -> None:
    inputs = [torch.randn(N, D).to(dtype), torch.randn(D).to(dtype)]
    check(kernel.rms_norm, reference.rms_norm, inputs, 1e-6)


@pytest.mark.parametrize("shape", [(1, 60), (3, 21, 96), (257, 100)])
def test_add_rms_norm(shape: tuple[int, ...]) -> None:
    inputs = [torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])]
    check(kernel.add_rms_norm, lambda x, r, w, eps: (reference.rms_norm(x + r, w, eps), x + r), inputs, 1e-6)


def test_a_program_sums_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridtrain.kernels.launch.MAX_PROGRAMS", 3)
    check(kernel.rms_norm, reference.rms_norm, [torch.randn(257, 60), torch.randn(60)], 1e-6)


def test_op_is_a_torch_op() -> None:
    x, weight = torch.randn(5, 24, requires_grad=True), torch.randn(24, requires_grad=True)
    torch.library.opcheck(kernel._op, (x, None, weight, 1e-6))
    torch.library.opcheck(kernel._op, (x, x.detach(), weight, 1e-6))
    compiled = torch.compile(kernel.rms_norm, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, 1e-6), kernel.rms_norm(x, weight, 1e-6))
    assert kernel.rms_norm(x.to("meta"), weight.to("meta"), 1e-6).shape == x.shape
