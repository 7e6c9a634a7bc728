"""The Triton source of the router, interpreted on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from hybridtrain.kernels.router_topk import op
from hybridtrain.kernels.router_topk.op import Routing, Rule
from hybridtrain.kernels.testing import check, poisoned

kernel = pytest.importorskip(
    "hybridtrain.kernels.router_topk.kernel", reason="needs triton", exc_type=ImportError
)
Router = Callable[[Tensor, Tensor, Rule], Routing]


@pytest.mark.parametrize(
    ("N", "E", "k", "groups"),
    [(1, 6, 1, (1, 1)), (63, 60, 4, (1, 1)), (130, 100, 3, (5, 2)), (63, 60, 4, (6, 1)), (9, 8, 2, (8, 3))],
)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
def test_router(N: int, E: int, k: int, groups: tuple[int, int], score: str, normalize: bool) -> None:
    logits, bias, rule = 2 * torch.randn(N, E), 0.1 * torch.randn(E), Rule(k, score, normalize, 2.5, *groups)
    with poisoned():
        mine = kernel.router_topk(logits, bias, rule)
    plain = op.router_topk(logits, bias, rule)
    assert torch.equal(mine.experts_NK, plain.experts_NK)
    assert torch.equal(mine.counts_E, plain.counts_E)
    torch.testing.assert_close(mine.entropy, plain.entropy, rtol=1e-5, atol=1e-5)
    check(
        lambda x: tuple(kernel.router_topk(x, bias, rule)),
        lambda x: tuple(op.router_topk(x, bias, rule)),
        [logits],
    )


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("read", [("gates_NK",), ("shares_E",), ("z",), ("gates_NK", "z"), ("shares_E", "z")])
def test_a_gradient_of_some_results(score: str, read: tuple[str, ...]) -> None:
    def results(router: Router, logits: Tensor) -> tuple[Tensor, ...]:
        routing = router(logits, torch.zeros(12), Rule(3, score, True, 2.5))
        return tuple(getattr(routing, name) for name in read)

    check(partial(results, kernel.router_topk), partial(results, op.router_topk), [2 * torch.randn(9, 12)])


@pytest.mark.parametrize("router", [kernel.router_topk, op.router_topk])
def test_makes_no_sum_that_is_not_asked_for(router: Router) -> None:
    logits, bias, rule = torch.randn(9, 12), torch.zeros(12), Rule(3, "softmax", True, 2.5)
    whole, some = router(logits, bias, rule), router(logits, bias, rule._replace(shares=False, z=False))
    assert some.shares_E is some.z is None
    for name in ("experts_NK", "gates_NK", "counts_E", "entropy"):
        assert torch.equal(getattr(some, name), getattr(whole, name))


def test_one_hot_expert_and_several_tiles_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridtrain.kernels.launch.MAX_PROGRAMS", 3)
    logits, bias = torch.randn(257, 16), torch.zeros(16).index_fill(0, torch.tensor(5), 10.0)
    mine = kernel.router_topk(logits, bias, Rule(2, "softmax", True, 1.0))
    assert mine.counts_E[5] == 257
    assert mine.counts_E.sum() == 2 * 257
    torch.testing.assert_close(mine.shares_E, logits.softmax(-1).sum(0))
    torch.testing.assert_close(mine.z, logits.logsumexp(-1).square().sum())


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_what_is_no_number_chooses_an_expert_that_exists() -> None:
    logits = torch.full((3, 6), torch.nan)
    mine = kernel.router_topk(logits, torch.zeros(6), Rule(2, "sigmoid", True, 1.0, 3, 1))
    assert ((mine.experts_NK >= 0) & (mine.experts_NK < 6)).all()
    assert mine.gates_NK.isnan().all()


def test_no_token() -> None:
    mine = kernel.router_topk(torch.empty(0, 6), torch.zeros(6), Rule(2, "softmax", True, 1.0))
    assert mine.experts_NK.shape == (0, 2)
    assert mine.counts_E.sum() == mine.z == mine.entropy == 0


def test_op_is_a_torch_op_and_refuses_a_rule_that_does_not_fit() -> None:
    logits, bias = torch.randn(5, 8, requires_grad=True), torch.zeros(8)
    for groups in ((1, 1), (4, 2)):
        torch.library.opcheck(kernel._op, (logits, bias, 2, True, True, 1.0, *groups))
    with pytest.raises(ValueError, match="k=9 experts of 1 of 1 groups do not fit 8 experts"):
        kernel.router_topk(logits, bias, Rule(9, "softmax", True, 1.0))
    with pytest.raises(ValueError, match="k=2 experts of 1 of 3 groups do not fit 8 experts"):
        kernel.router_topk(logits, bias, Rule(2, "softmax", True, 1.0, 3, 1))
