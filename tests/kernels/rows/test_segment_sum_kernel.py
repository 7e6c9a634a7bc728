"""The Triton source of the segment sum, interpreted on the CPU: bit for bit the definition's."""

from __future__ import annotations

import pytest
import torch

from hybridtrain.kernels.rows import reference
from hybridtrain.kernels.testing import poisoned

kernel = pytest.importorskip(
    "hybridtrain.kernels.rows.segment_sum_kernel", reason="needs triton", exc_type=ImportError
)


@pytest.mark.parametrize(
    ("N", "S", "D"), [(0, 3, 8), (1, 1, 60), (63, 9, 96), (257, 300, 100), (257, 1, 60), (0, 0, 4)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adds_in_the_order_of_the_definition(N: int, S: int, D: int, dtype: torch.dtype) -> None:
    values = (torch.randn(N, D) * 10 ** torch.empty(N, 1).uniform_(-3, 3)).to(dtype)
    segment = torch.randint(0, max(S, 1), (N,))
    with poisoned():
        out = kernel.segment_sum(values, segment, S)
    assert torch.equal(out, reference.segment_sum(values, segment, S))


def test_slices_and_rows_far_apart() -> None:
    storage = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    values = storage.as_strided((3, 64), (2**30, 1))
    for n in range(3):
        values[n] = torch.arange(64) * (n + 1)
    segment = torch.tensor([1, 0, 1])
    assert torch.equal(kernel.segment_sum(values, segment, 2), reference.segment_sum(values, segment, 2))


def test_op_is_a_torch_op_and_refuses_what_does_not_fit() -> None:
    torch.library.opcheck(kernel._op, (torch.randn(7, 8), torch.randint(0, 3, (7,)), 3))
    with pytest.raises(ValueError, match=r"values \[2, 3\] and segment \[3\] must be \[N, D\] and \[N\]"):
        kernel.segment_sum(torch.ones(2, 3), torch.tensor([0, 1, 1]), 2)
