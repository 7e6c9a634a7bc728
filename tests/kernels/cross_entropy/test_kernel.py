"""The Triton source of the cross-entropy, interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch

from hybridtrain.kernels.choose import Backends
from hybridtrain.kernels.cross_entropy import op, reference
from hybridtrain.kernels.linear_cross_entropy import reference as linear
from hybridtrain.kernels.testing import check

kernel = pytest.importorskip(
    "hybridtrain.kernels.cross_entropy.kernel", reason="needs triton", exc_type=ImportError
)


@pytest.mark.parametrize(
    ("N", "V", "dtype"),
    [
        (1, 60, torch.float32),
        (63, 96, torch.bfloat16),
        (257, 100, torch.float32),
        (5, 1000, torch.float32),
        (5, 1000, torch.bfloat16),
    ],
)
def test_cross_entropy(N: int, V: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "BLOCK", 256)
    targets = torch.randint(0, V, (N,))
    targets[::5] = -100
    logits = (4 * torch.randn(N, V)).to(dtype)
    check(kernel.cross_entropy_sum, reference.cross_entropy_sum, [logits], targets, -100)


def test_shards_of_a_vocabulary_join() -> None:
    logits, targets = 4 * torch.randn(9, 96), torch.randint(0, 96, (9,))

    def in_three(logits: torch.Tensor) -> torch.Tensor:
        parts = [
            kernel.partial(part, targets, first)
            for part, first in zip(logits.split(32, 1), (0, 32, 64), strict=True)
        ]
        lse = torch.stack([lse for lse, _ in parts]).logsumexp(0)
        return (lse - sum(picked for _, picked in parts)).sum()

    # a shard's softmax is scaled to the whole: two exponentials where the definition has one
    check(in_three, lambda x: reference.cross_entropy_sum(x, targets, -100), [logits], times=8.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_as_torch_makes_them(dtype: torch.dtype) -> None:
    logits, targets = (4 * torch.randn(63, 60)).to(dtype), torch.randint(0, 200, (63,))
    targets[::7] = -100
    scale = torch.rand(63)
    sums = [
        torch.stack([m + s.log(), picked]) for m, s, picked in run_both(op.partial_sums, logits, targets, 70)
    ]
    torch.testing.assert_close(*sums)
    normalizer = sums[0][0] + 1
    torch.testing.assert_close(*run_both(op.partial_gradient, logits, targets, 70, normalizer, scale))


def run_both(function, logits, *rest):  # type: ignore[no-untyped-def]
    """By torch and by Triton."""
    results = []
    for how in ("torch", "triton"):
        backends = Backends({"cross_entropy": how}, logits.device.type)
        results.append(function(logits.clone(), *rest, backends))
    return results


@pytest.mark.parametrize("rows", [16, 4096])
def test_chunks_of_the_head(rows: int) -> None:
    targets = torch.randint(0, 100, (63,))
    targets[3] = -1
    inputs = [torch.randn(63, 24), torch.randn(100, 24)]
    check(
        lambda h, w: kernel.linear_cross_entropy_sum(h, w, targets, -1, rows),
        lambda h, w: linear.linear_cross_entropy_sum(h, w, targets, -1),
        inputs,
    )


def test_logits_far_apart_and_minus_infinity() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-torch.inf, 2.0, 1.0]])
    out = kernel.cross_entropy_sum(logits, torch.tensor([1, 1]), -1)
    torch.testing.assert_close(
        out, torch.nn.functional.cross_entropy(logits, torch.tensor([1, 1]), reduction="sum")
    )


def test_op_is_a_torch_op() -> None:
    torch.library.opcheck(kernel._op, (torch.randn(5, 70, requires_grad=True), torch.randint(0, 70, (5,)), 0))
    h, weight = torch.randn(5, 8, requires_grad=True), torch.randn(70, 8, requires_grad=True)
    torch.library.opcheck(kernel._op_chunks, (h, weight, torch.randint(0, 70, (5,)), -1, 2))
