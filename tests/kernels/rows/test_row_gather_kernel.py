"""The Triton source of the row gather, interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch

from hybridtrain.kernels.rows import eight_bits, reference
from hybridtrain.kernels.testing import check, poisoned

kernel = pytest.importorskip(
    "hybridtrain.kernels.rows.row_gather_kernel", reason="needs triton", exc_type=ImportError
)


@pytest.mark.parametrize(("U", "D"), [(0, 8), (1, 60), (63, 96), (257, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathers(U: int, D: int, dtype: torch.dtype) -> None:
    table, rows = torch.randn(40, D).to(dtype), torch.randint(40, (U,))
    with poisoned():
        assert torch.equal(kernel.row_gather(table, rows), table[rows])
    wide = torch.randn(40, D + 5).to(dtype)[:, 2 : D + 2]
    assert torch.equal(kernel.row_gather(wide, rows[::2]), wide[rows[::2]])
    assert torch.equal(kernel.pack(wide, rows[::2]), eight_bits.pack(wide[rows[::2]]))


def test_gradient() -> None:
    check(
        kernel.row_gather, reference.row_gather, [torch.randn(40, 24)], torch.randint(30, (257,))
    )  # ten rows nobody asks for


def test_addresses_beyond_31_bits() -> None:
    storage = torch.empty(
        2**31 + 4096, dtype=torch.bfloat16
    )  # touched in two places only: no memory is spent on the rest
    table = storage.as_strided((3, 64), (2**30, 1))
    table[0], table[2] = torch.arange(64), torch.arange(64) + 64
    assert table[2].storage_offset() == 2**31
    assert torch.equal(kernel.row_gather(table, torch.tensor([2, 0])), table[[2, 0]])
    assert torch.equal(kernel.pack(table, torch.tensor([2, 0])), eight_bits.pack(table[[2, 0]]))


@pytest.mark.parametrize(("U", "D"), [(0, 8), (1, 60), (63, 5), (257, 100)])
def test_packs_and_unpacks_as_the_definition(U: int, D: int) -> None:
    table, rows = torch.randn(40, D) * 10.0 ** torch.randint(-35, 30, (40, 1)), torch.randint(40, (U,))
    table[0] = 0
    with poisoned():
        packed, all_rows = kernel.pack(table, rows), kernel.pack(table.bfloat16(), None)
        assert torch.equal(packed, eight_bits.pack(table[rows]))
        assert torch.equal(all_rows, eight_bits.pack(table.bfloat16()))
        assert torch.equal(kernel.unpack(packed, D), eight_bits.unpack(packed, D))


def test_every_code_and_every_border_between_two() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float()
    packed = torch.zeros(1, eight_bits.packed_width(256), dtype=torch.uint8)
    packed[0, :256], packed.view(torch.float32)[0, -1] = codes, 1.0
    torch.testing.assert_close(kernel.unpack(packed, 256)[0], values, rtol=0, atol=0, equal_nan=True)
    finite = values[values.isfinite()].sort().values
    middles = (finite[1:] + finite[:-1]) / 2  # of two neighbours: ties
    near = torch.cat(
        [finite, middles, middles.nextafter(torch.tensor(1e9)), middles.nextafter(torch.tensor(-1e9))]
    )
    assert near.abs().max() == 448  # so the scale is one
    assert torch.equal(kernel.pack(near[None], None), eight_bits.pack(near[None]))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(wrong: float) -> None:
    x = torch.randn(2, 32)
    x[0, 3] = wrong
    for pack, unpack in ((kernel.pack, kernel.unpack), (lambda x, _: eight_bits.pack(x), eight_bits.unpack)):
        out = unpack(pack(x, None), 32)
        assert not out[0, 3].isfinite()
        assert out[1].isfinite().all()


def test_ops_are_torch_ops_and_refuse_what_does_not_fit() -> None:
    table, rows = torch.randn(5, 8, requires_grad=True), torch.tensor([1, 4, 1])
    torch.library.opcheck(kernel._op, (table, rows))
    torch.library.opcheck(kernel._op_pack, (table.detach(), rows))
    torch.library.opcheck(kernel._op_pack, (table.detach(), None))
    torch.library.opcheck(kernel._op_unpack, (kernel.pack(table, rows), 8))
    with pytest.raises(
        ValueError, match=r"table \[2, 3\] and rows \[1, 1\] must be \[R, D\] with whole rows, and \[U\]"
    ):
        kernel.row_gather(torch.ones(2, 3), torch.zeros(1, 1, dtype=torch.int64))
