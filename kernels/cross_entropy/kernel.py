"""Cross-entropy in Triton, over a whole vocabulary or a shard of it; the maths is in README.md.

N tokens, V vocabulary or this rank's part of it. `partial` gives the two numbers a token's loss is made of,
both with a gradient; ranks that share a vocabulary join theirs in plain torch. `linear_cross_entropy_sum`
goes by chunks of tokens: no logits of all of them exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from hybridtrain.kernels.cross_entropy.op import wide_product
from hybridtrain.kernels.launch import Case, ceil_div, launch, num_bytes

BLOCK = 4096


@triton.jit
def _partial_kernel(logits_ptr, targets_ptr, lse_ptr, picked_ptr, V, first, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    highest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + n * V + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, logits)
        settled = tl.where(
            higher == float("-inf"), 0.0, higher
        )  # a lane that has seen nothing yet must not make NaN
        total = total * tl.exp(highest - settled) + tl.exp(logits - settled)
        highest = higher
    peak = tl.max(highest, 0)
    tl.store(lse_ptr + n, peak + tl.log(tl.sum(total * tl.exp(highest - peak), 0)))
    target = tl.load(targets_ptr + n) - first
    here = (target >= 0) & (target < V)
    tl.store(
        picked_ptr + n,
        tl.load(logits_ptr + n * V + tl.where(here, target, 0), mask=here, other=0.0).to(tl.float32),
    )


@triton.jit
def _gradient_kernel(
    grad_lse_ptr, grad_picked_ptr, logits_ptr, targets_ptr, lse_ptr, grad_logits_ptr, V, first,
    BLOCK: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + n * V + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
    grad = tl.load(grad_lse_ptr + n) * tl.exp(logits - tl.load(lse_ptr + n))
    grad += tl.where(cols == tl.load(targets_ptr + n) - first, tl.load(grad_picked_ptr + n), 0.0)
    tl.store(grad_logits_ptr + n * V + cols, grad.to(grad_logits_ptr.dtype.element_ty), mask=cols < V)


def _partial(logits_NV: Tensor, targets_N: Tensor, first: int) -> tuple[Tensor, Tensor]:
    lse, picked = (logits_NV.new_empty(len(logits_NV), dtype=torch.float32) for _ in range(2))
    V = logits_NV.size(1)
    block = min(BLOCK, max(64, triton.next_power_of_2(V)))
    launch(
        _partial_kernel, (len(logits_NV),), logits_NV, targets_N, lse, picked, V, first,
        constants={"BLOCK": block}, num_warps=max(1, block // 512),
    )  # fmt: skip
    return lse, picked


def _gradient(
    grad_lse: Tensor, grad_picked: Tensor, logits_NV: Tensor, targets_N: Tensor, lse_N: Tensor, first: int
) -> Tensor:
    out = torch.empty_like(logits_NV)
    N, V = logits_NV.shape
    block = min(BLOCK, max(64, triton.next_power_of_2(V)))
    launch(
        _gradient_kernel, (N, ceil_div(V, block)), grad_lse, grad_picked, logits_NV, targets_N, lse_N, out,
        V, first,
        constants={"BLOCK": block}, num_warps=max(1, block // 512),
    )  # fmt: skip
    return out


_op = custom_op("hybridtrain::cross_entropy_partial", _partial, mutates_args=())
gradient = custom_op("hybridtrain::cross_entropy_gradient", _gradient, mutates_args=())


@_op.register_fake
def _(logits_NV: Tensor, targets_N: Tensor, first: int) -> tuple[Tensor, Tensor]:
    N = logits_NV.size(0)
    return logits_NV.new_empty(N, dtype=torch.float32), logits_NV.new_empty(N, dtype=torch.float32)


@gradient.register_fake
def _(
    grad_lse: Tensor, grad_picked: Tensor, logits_NV: Tensor, targets_N: Tensor, lse_N: Tensor, first: int
) -> Tensor:
    return torch.empty_like(logits_NV)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits_NV, targets_N, ctx.first = inputs
    ctx.save_for_backward(logits_NV, targets_N, output[0])


def _gradients(ctx: Any, grad_lse: Tensor, grad_picked: Tensor) -> tuple[Tensor | None, ...]:
    return (
        gradient(grad_lse.contiguous(), grad_picked.contiguous(), *ctx.saved_tensors, ctx.first),
        None,
        None,
    )


_op.register_autograd(_gradients, setup_context=_setup)


def partial(logits_NV: Tensor, targets_N: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
    """(log-sum-exp, logit of the target or 0 where it is not here), float32 [N]; column 0 is entry `first` of
    the vocabulary.
    """
    out: tuple[Tensor, Tensor] = _op(logits_NV.contiguous(), targets_N.contiguous(), first)
    return out


def cross_entropy_sum(logits_NV: Tensor, targets_N: Tensor, ignored: int) -> Tensor:
    """As op.cross_entropy_sum, in one pass each way over logits of any float type."""
    lse_N, picked_N = partial(logits_NV, targets_N)
    return torch.where(targets_N != ignored, lse_N - picked_N, 0.0).sum()


def _chunks(
    h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignored: int, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient of h, gradient of the weight): made together, chunk by chunk."""
    keep_N = (targets_N != ignored).float()
    loss = h_ND.new_zeros((), dtype=torch.float32)
    grad_h, grad_weight = torch.empty_like(h_ND), torch.zeros_like(weight_VD, dtype=torch.float32)
    for start in range(0, len(h_ND), rows):
        chunk = slice(start, start + rows)
        logits = h_ND[chunk] @ weight_VD.t()
        lse, picked = _partial(logits, targets_N[chunk], 0)
        loss += ((lse - picked) * keep_N[chunk]).sum()
        grad = _gradient(keep_N[chunk], -keep_N[chunk], logits, targets_N[chunk], lse, 0)
        torch.mm(grad, weight_VD, out=grad_h[chunk])
        grad_weight += wide_product(grad.t(), h_ND[chunk])
    return loss, grad_h, grad_weight.to(weight_VD.dtype)


_op_chunks = custom_op("hybridtrain::linear_cross_entropy", _chunks, mutates_args=())


@_op_chunks.register_fake
def _(
    h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignored: int, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    return h_ND.new_empty((), dtype=torch.float32), torch.empty_like(h_ND), torch.empty_like(weight_VD)


def _setup_chunks(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _gradients_chunks(ctx: Any, grad: Tensor, _: Tensor, __: Tensor) -> tuple[Tensor | None, ...]:
    grad_h, grad_weight = ctx.saved_tensors
    return grad_h * grad.to(grad_h.dtype), grad_weight * grad.to(grad_weight.dtype), None, None, None


_op_chunks.register_autograd(_gradients_chunks, setup_context=_setup_chunks)


def linear_cross_entropy_sum(
    h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignored: int, rows: int = 4096
) -> Tensor:
    """Head and summed cross-entropy in chunks of `rows` tokens: float32, in nats."""
    loss: Tensor = _op_chunks(
        h_ND.contiguous(), weight_VD.contiguous(), targets_N.contiguous(), ignored, rows
    )[0]
    return loss


def cases() -> Iterator[Case]:
    """A chunk of 4096 tokens over a vocabulary of 131,072."""
    logits = torch.empty(4096, 131_072, dtype=torch.bfloat16, device="meta")
    targets, lse = logits.new_empty(4096, dtype=torch.int64), logits.new_empty(4096, dtype=torch.float32)
    size = num_bytes(logits)
    yield Case("cross_entropy", "forward N=4096 V=131072", lambda: _partial(logits, targets, 0), size)
    yield Case(
        "cross_entropy",
        "backward N=4096 V=131072",
        lambda: _gradient(lse, lse, logits, targets, lse, 0),
        2 * size,
    )
