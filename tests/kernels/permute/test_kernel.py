"""The Triton source of the permutation, interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch

from hybridtrain.kernels.moe_swiglu.op import sort_by_expert
from hybridtrain.kernels.permute import op, reference
from hybridtrain.kernels.testing import check, poisoned

kernel = pytest.importorskip(
    "hybridtrain.kernels.permute.kernel", reason="needs triton", exc_type=ImportError
)


def routed(N: int, K: int, E: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Some experts stay empty, and the last takes every token."""
    experts = (
        torch.stack([torch.randperm(E - 1)[: K - 1] for _ in range(N)])
        if K > 1
        else torch.empty(N, 0, dtype=torch.int64)
    )
    return sort_by_expert(torch.cat([experts, torch.full((N, 1), E - 1)], 1), E)


@pytest.mark.parametrize(("N", "K", "E", "D"), [(1, 1, 3, 60), (63, 3, 50, 96), (257, 2, 8, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_permute_and_combine(N: int, K: int, E: int, D: int, dtype: torch.dtype) -> None:
    order, inverse, _ = routed(N, K, E)
    check(kernel.permute, reference.permute, [torch.randn(N, D).to(dtype)], order, inverse)
    inputs = [torch.randn(N * K, D).to(dtype), torch.rand(N, K).to(dtype)]
    check(
        lambda y, g: kernel.combine(y, g, order, inverse),
        lambda y, g: reference.combine(y, g, order, inverse),
        inputs,
    )


def chosen(N: int, K: int, E: int) -> torch.Tensor:
    """Distinct experts of each token, some choices absent, some experts never chosen."""
    experts = torch.rand(N, E).topk(K).indices
    return experts.where(torch.rand(N, K) < 0.8, torch.randint(-2, 0, (N, K)) * (torch.rand(N, K) < 0.5) + E)


@pytest.mark.parametrize(
    ("N", "K", "E", "R"),
    [(1, 1, 4, 2), (63, 3, 12, 4), (257, 8, 64, 16), (257, 6, 96, 32), (63, 2, 6, 1), (0, 2, 4, 2)],
)
def test_each_token_once_to_each_rank(
    N: int, K: int, E: int, R: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        kernel, "row_tile", lambda width: ({"BLOCK_N": 32, "BLOCK_D": max(16, R)}, 1)
    )  # several tiles
    one_hot = torch.arange(K).repeat(N, 1)  # every token's choices on the first ranks
    for experts in (chosen(N, K, E), one_hot, torch.full((N, K), -1)):
        wanted = reference.sort_by_destination(experts, E, R)
        with poisoned():
            got = kernel.sort_by_destination(experts, E, R)
        for mine, exact in zip(got, wanted, strict=True):
            assert mine.dtype == torch.int64
            assert torch.equal(mine, exact)


@pytest.mark.parametrize(("N", "K", "D"), [(1, 1, 60), (63, 3, 96), (257, 6, 100)])
def test_tokens_go_once_and_their_sums_come_back(N: int, K: int, D: int) -> None:
    order, inverse, asked = reference.sort_by_destination(chosen(N, K, 24), 24, 8)
    order = order[: asked[:, 0].sum()]
    # torch's form is the definition here
    check(kernel.permute, op.spread, [torch.randn(N, D)], order, inverse)
    check(lambda y, *o: kernel.combine(y, None, *o), op.collect, [torch.randn(len(order), D)], order, inverse)


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
    torch.library.opcheck(kernel._op_line_up, (chosen(9, 3, 8), 8, 4))
    assert kernel.sort_by_destination(torch.empty(9, 3, dtype=torch.int64, device="meta"), 8, 4)[0].shape == (
        27,
    )
