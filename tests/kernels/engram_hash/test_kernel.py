"""The Triton source of the hash, interpreted on the CPU: bit for bit the definition's."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from hybridtrain.kernels.engram_hash import op, reference
from hybridtrain.kernels.engram_hash.addressing import Addressing, TableShape
from hybridtrain.kernels.testing import poisoned

kernel = pytest.importorskip(
    "hybridtrain.kernels.engram_hash.kernel", reason="needs triton", exc_type=ImportError
)


def addressing(boundary: str = "document", orders: tuple[int, ...] = (2, 3), heads: int = 3) -> Addressing:
    return Addressing.draw(
        TableShape([1, 3], orders, heads, 1000), np.arange(500) % 431, pad_id=7, boundary=boundary, seed=5
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(("B", "T"), [(1, 1), (2, 63), (1, 257)])
@pytest.mark.parametrize("boundary", ["document", "stream"])
@pytest.mark.parametrize("orders", [(2, 3), (3,), (2, 4)])
def test_equals_the_definition(B: int, T: int, boundary: str, orders: tuple[int, ...]) -> None:
    a = addressing(boundary, orders)
    tokens, starts = torch.randint(0, 500, (B, T)), torch.rand(B, T) < 0.2
    with poisoned():
        out = kernel.row_ids(a, tokens, starts)
    assert np.array_equal(out.cpu().numpy(), reference.row_ids(a, tokens.cpu().numpy(), starts.cpu().numpy()))


def test_a_document_per_token() -> None:
    tokens, starts = torch.randint(0, 500, (2, 40)), torch.ones(2, 40, dtype=torch.bool)
    out = kernel.row_ids(addressing(), tokens, starts)
    assert np.array_equal(
        out.cpu().numpy(), reference.row_ids(addressing(), tokens.cpu().numpy(), starts.cpu().numpy())
    )


def test_a_million_tokens_equal_the_torch_form(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ["TRITON_INTERPRET"] == "1":  # fewer programs, one after the other
        monkeypatch.setattr(kernel, "BLOCK_N", 1 << 15)
    a = addressing(heads=2)
    tokens, starts = torch.randint(0, 500, (4, 250_000)), torch.rand(4, 250_000) < 0.01
    assert torch.equal(kernel.row_ids(a, tokens, starts), op.row_ids(a, tokens, starts))


def test_products_that_wrap() -> None:
    a = addressing()
    huge = np.array([[2**63 - 1, 2**62 + 1, 2**61 + 1]] * 2)
    wrapping = Addressing(a.layers, a.orders, a.heads, huge, a.primes, a.compression, a.pad_id, a.boundary)
    tokens, starts = torch.randint(0, 500, (2, 63)), torch.rand(2, 63) < 0.2
    out = kernel.row_ids(wrapping, tokens, starts)
    assert np.array_equal(
        out.cpu().numpy(), reference.row_ids(wrapping, tokens.cpu().numpy(), starts.cpu().numpy())
    )


def test_op_is_a_torch_op() -> None:
    tokens, starts = torch.randint(0, 500, (2, 5)), torch.rand(2, 5) < 0.2
    tables = op._tables(addressing(), tokens.device)
    torch.library.opcheck(kernel._op, (tokens, starts, *tables, [2, 3], 7, True))
    with pytest.raises(ValueError, match=r"tokens \[2, 5\] and starts \[5\] must have one shape"):
        kernel.row_ids(addressing(), tokens, starts[0])
