"""The Triton source of the row gather, interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch

from hybridtrain.kernels.row_gather import reference
from hybridtrain.kernels.testing import poisoned

kernel = pytest.importorskip("hybridtrain.kernels.row_gather.kernel", reason="needs triton", exc_type=ImportError)


@pytest.mark.parametrize(("U", "D"), [(0, 8), (1, 60), (63, 96), (257, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathers(U: int, D: int, dtype: torch.dtype) -> None:
    table, rows = torch.randn(40, D).to(dtype), torch.randint(-1, 40, (U,))
    with poisoned():
        assert torch.equal(kernel.row_gather(table, rows), reference.row_gather(table, rows))
    wide = torch.randn(40, D + 5).to(dtype)[:, 2 : D + 2]
    assert torch.equal(kernel.row_gather(wide, rows), reference.row_gather(wide, rows))


def test_addresses_beyond_31_bits() -> None:
    storage = torch.empty(2**31 + 4096, dtype=torch.bfloat16)  # touched in two places only: no memory is spent on the rest
    table = storage.as_strided((3, 64), (2**30, 1))
    table[0], table[2] = torch.arange(64), torch.arange(64) + 64
    assert table[2].storage_offset() == 2**31
    assert torch.equal(kernel.row_gather(table, torch.tensor([2, 0])), table[[2, 0]])


def test_op_is_a_torch_op_and_refuses_what_does_not_fit() -> None:
    torch.library.opcheck(kernel._op, (torch.randn(5, 8), torch.tensor([1, 4, 1])))
    with pytest.raises(ValueError, match=r"table \[2, 3\] and rows \[1, 1\] must be \[R, D\] with whole rows, and \[U\]"):
        kernel.row_gather(torch.ones(2, 3), torch.zeros(1, 1, dtype=torch.int64))
