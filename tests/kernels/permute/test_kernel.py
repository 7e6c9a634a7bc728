"""The Triton source of the permutation, interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch

from hybridtrain.kernels.permute import reference
from hybridtrain.kernels.testing import check

kernel = pytest.importorskip("hybridtrain.kernels.permute.kernel", reason="needs triton", exc_type=ImportError)


def routed(N: int, K: int, E: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Some experts stay empty, and the last takes every token."""
    experts = torch.stack([torch.randperm(E - 1)[: K - 1] for _ in range(N)]) if K > 1 else torch.empty(N, 0, dtype=torch.int64)
    return reference.sort_by_expert(torch.cat([experts, torch.full((N, 1), E - 1)], 1), E)


@pytest.mark.parametrize(("N", "K", "E", "D"), [(1, 1, 3, 60), (63, 3, 50, 96), (257, 2, 8, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_permute_and_combine(N: int, K: int, E: int, D: int, dtype: torch.dtype) -> None:
    order, inverse, _ = routed(N, K, E)
    check(kernel.permute, reference.permute, [torch.randn(N, D).to(dtype)], order, inverse)
    inputs = [torch.randn(N * K, D).to(dtype), torch.rand(N, K).to(dtype)]
    check(lambda y, g: kernel.combine(y, g, order, inverse), lambda y, g: reference.combine(y, g, order, inverse), inputs)


def test_padded_groups_change_nothing() -> None:
    N, K, E, D = 63, 3, 9, 20
    order, inverse, counts = routed(N, K, E)
    padded_order, padded_inverse, padded = kernel.pad_groups(order, inverse, counts, 16)
    assert (padded % 16 == 0).all()
    assert padded.sum() == len(padded_order)
    assert (padded >= counts).all()
    gates = torch.rand(N, K)

    def through(x: torch.Tensor) -> torch.Tensor:
        spread = kernel.permute(x, padded_order, padded_inverse)
        assert torch.equal(spread[padded_order < 0], torch.zeros(len(padded_order) - N * K, D))
        return kernel.combine(spread * 2, gates, padded_order, padded_inverse)

    plain = lambda x: reference.combine(reference.permute(x, order, inverse) * 2, gates, order, inverse)  # noqa: E731
    check(through, plain, [torch.randn(N, D)])
    group = torch.repeat_interleave(torch.arange(E), padded)
    experts = torch.repeat_interleave(torch.arange(E), counts)
    assert torch.equal(group[padded_inverse.reshape(-1)], experts[inverse.reshape(-1)])


def test_ops_are_torch_ops() -> None:
    order, inverse, _ = routed(5, 2, 4)
    torch.library.opcheck(kernel._op_permute, (torch.randn(5, 8, requires_grad=True), order, inverse))
    gates = torch.rand(5, 2, requires_grad=True)
    torch.library.opcheck(kernel._op_combine, (torch.randn(10, 8, requires_grad=True), gates, order, inverse))
