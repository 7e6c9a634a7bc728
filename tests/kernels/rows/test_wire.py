"""What rows lose on the wire."""

from __future__ import annotations

import pytest
import torch

from hybridtrain.kernels.rows.op import pack, unpack


@pytest.mark.parametrize(("wire", "bytes_of_a_row"), [("exact", 400), ("bfloat16", 200), ("float8", 112)])
def test_rows_come_back_within_the_bound(wire: str, bytes_of_a_row: int) -> None:
    table, rows = torch.randn(500, 100) * 10.0 ** torch.randint(-9, 9, (500, 1)), torch.randperm(500)[:200]
    payload = pack(table, rows, wire)
    assert payload[0].nbytes == bytes_of_a_row
    assert torch.equal(payload, pack(table[rows], None, wire))
    wanted = table[rows].double()
    error = (unpack(payload, 100, wire).double() - wanted).abs()
    scale = wanted.abs().amax(1, keepdim=True) / 448
    bound = {
        "exact": 0 * scale,
        "bfloat16": 2.0**-8 * wanted.abs(),
        "float8": torch.maximum(2.0**-4 * wanted.abs(), 2.0**-10 * scale),
    }
    assert (error <= bound[wire] * (1 + 1e-5)).all()
    if wire != "exact":
        assert (error > bound[wire] / 2).any()  # the bound is not a wide one


def test_packed_rows_are_packed_again_as_they_are() -> None:
    once = unpack(pack(torch.randn(50, 24), None, "float8"), 24, "float8")
    assert torch.equal(unpack(pack(once, None, "float8"), 24, "float8"), once)
