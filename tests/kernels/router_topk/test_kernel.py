"""The Triton source of the router, interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch

from hybridtrain.kernels.router_topk import reference
from hybridtrain.kernels.testing import check, poisoned

kernel = pytest.importorskip("hybridtrain.kernels.router_topk.kernel", reason="needs triton", exc_type=ImportError)


@pytest.mark.parametrize(("N", "E", "k"), [(1, 6, 1), (63, 60, 4), (257, 100, 3)])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
def test_router(N: int, E: int, k: int, score: str, normalize: bool) -> None:
    logits, bias = 2 * torch.randn(N, E), 0.1 * torch.randn(E)
    with poisoned():
        mine = kernel.router_topk(logits, bias, k, score, normalize, 2.5)
    plain = reference.router_topk(logits, bias, k, score, normalize, 2.5)
    assert torch.equal(mine.experts_NK, plain.experts_NK)
    assert torch.equal(mine.counts_E, plain.counts_E)
    torch.testing.assert_close(mine.entropy, plain.entropy, rtol=1e-5, atol=1e-5)
    check(
        lambda x: tuple(kernel.router_topk(x, bias, k, score, normalize, 2.5)),
        lambda x: tuple(reference.router_topk(x, bias, k, score, normalize, 2.5)),
        [logits],
    )


def test_one_hot_expert_and_several_tiles_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridtrain.kernels.launch.MAX_PROGRAMS", 3)
    logits, bias = torch.randn(257, 16), torch.zeros(16).index_fill(0, torch.tensor(5), 10.0)
    mine = kernel.router_topk(logits, bias, 2, "softmax", True, 1.0)
    assert mine.counts_E[5] == 257
    assert mine.counts_E.sum() == 2 * 257
    torch.testing.assert_close(mine.shares_E, logits.softmax(-1).sum(0))
    torch.testing.assert_close(mine.z, logits.logsumexp(-1).square().sum())


def test_op_is_a_torch_op_and_refuses_too_many_experts() -> None:
    torch.library.opcheck(kernel._op, (torch.randn(5, 8, requires_grad=True), torch.zeros(8), 2, True, True, 1.0))
    with pytest.raises(ValueError, match="k=9 experts of 8; it may be 1 to 8"):
        kernel.router_topk(torch.randn(5, 8), torch.zeros(8), 9, "softmax", True, 1.0)
