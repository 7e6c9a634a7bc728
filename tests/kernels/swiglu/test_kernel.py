"""The Triton source of SwiGLU, interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch

from hybridtrain.kernels.swiglu import reference
from hybridtrain.kernels.testing import check

kernel = pytest.importorskip("hybridtrain.kernels.swiglu.kernel", reason="needs triton", exc_type=ImportError)


@pytest.mark.parametrize("shape", [(1, 60), (63, 96), (257, 100), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(kernel.swiglu, reference.swiglu, [(3 * torch.randn(shape)).to(dtype) for _ in range(2)])


def test_strided_inputs_and_torch_op() -> None:
    gate, up = torch.randn(5, 48, requires_grad=True).chunk(2, -1)
    torch.testing.assert_close(kernel.swiglu(gate, up), reference.swiglu(gate, up))
    torch.library.opcheck(kernel._op, tuple(torch.randn(3, 8, requires_grad=True) for _ in range(2)))


def test_refuses_unlike_inputs() -> None:
    with pytest.raises(
        ValueError, match=r"gate \[2, 3\] torch.float32 and up \[3, 2\] torch.float32 must be alike"
    ):
        kernel.swiglu(torch.ones(2, 3), torch.ones(3, 2))
