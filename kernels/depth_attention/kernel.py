"""Attention over depth in Triton: one program per token and key head, keys and values read once each; the
maths is in README.md.

N tokens, H query heads, G key/value heads, R = H/G queries a key head, S depth slots, C head width. Keys and
values may lie in a larger preallocated buffer: slots and heads any distance apart, so no layer copies what
earlier layers wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from hybridtrain.kernels.launch import Case, launch, num_bytes


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, S, G, R, C, scale, stride_n, stride_s, stride_g,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    queries, slots, cols = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_C)
    heads = (n * G + head) * R + queries
    inside = (queries < R)[:, None] & (cols < C)[None, :]
    q = tl.load(q_ptr + heads[:, None] * C + cols[None, :], mask=inside, other=0.0).to(tl.float32) * scale
    highest = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    mass = tl.zeros([BLOCK_R], dtype=tl.float32)
    total = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    base = n * stride_n + head * stride_g
    for start in range(0, S, BLOCK_S):
        there = start + slots < S
        at = base + (start + slots).to(tl.int64)[:, None] * stride_s + cols[None, :]
        mask = there[:, None] & (cols < C)[None, :]
        k = tl.load(k_ptr + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(there[None, :], tl.sum(q[:, None, :] * k[None, :, :], 2), float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        faded = tl.exp(highest - higher)
        mass = mass * faded + tl.sum(weights, 1)
        total = total * faded[:, None] + tl.sum(weights[:, :, None] * v[None, :, :], 1)
        highest = higher
    out = total / mass[:, None]
    tl.store(out_ptr + heads[:, None] * C + cols[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + heads, highest + tl.log(mass), mask=queries < R)


@triton.jit
def _backward_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, grad_q_ptr, grad_k_ptr, grad_v_ptr, S, G, R, C, scale,
    stride_n, stride_s, stride_g, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    queries, slots, cols = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_C)
    heads = (n * G + head) * R + queries
    q_at = heads[:, None] * C + cols[None, :]
    inside = (queries < R)[:, None] & (cols < C)[None, :]
    q = tl.load(q_ptr + q_at, mask=inside, other=0.0).to(tl.float32) * scale
    grad = tl.load(grad_ptr + q_at, mask=inside, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + heads, mask=queries < R, other=0.0)
    delta = tl.load(delta_ptr + heads, mask=queries < R, other=0.0)
    grad_q = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    base = n * stride_n + head * stride_g
    for start in range(0, S, BLOCK_S):
        there = start + slots < S
        at = base + (start + slots).to(tl.int64)[:, None] * stride_s + cols[None, :]
        mask = there[:, None] & (cols < C)[None, :]
        k = tl.load(k_ptr + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
        scores = tl.sum(q[:, None, :] * k[None, :, :], 2) - lse[:, None]
        weights = tl.where(there[None, :] & (queries < R)[:, None], tl.exp(scores), 0.0)
        slopes = weights * (tl.sum(grad[:, None, :] * v[None, :, :], 2) - delta[:, None])
        grad_q += tl.sum(slopes[:, :, None] * k[None, :, :], 1)
        out_at = ((n * S + start + slots) * G + head)[:, None] * C + cols[None, :]
        grad_k = tl.sum(slopes[:, :, None] * q[:, None, :], 0)
        tl.store(grad_k_ptr + out_at, grad_k.to(grad_k_ptr.dtype.element_ty), mask=mask)
        grad_v = tl.sum(weights[:, :, None] * grad[:, None, :], 0)
        tl.store(grad_v_ptr + out_at, grad_v.to(grad_v_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_q_ptr + q_at, (grad_q * scale).to(grad_q_ptr.dtype.element_ty), mask=inside)


def _arguments(q_NHC: Tensor, k_NSGC: Tensor, scale: float) -> tuple[tuple[Any, ...], dict[str, int]]:
    """(the numbers both kernels take, their constants): a product tile [R, S, C] of at most 4096 elements
    where C allows it.
    """
    S, G, C = k_NSGC.shape[1:]
    R = q_NHC.size(1) // G
    block_r, block_c = triton.next_power_of_2(R), max(16, triton.next_power_of_2(C))
    block_s = min(triton.next_power_of_2(max(S, 1)), max(1, 4096 // (block_r * block_c)))
    return (S, G, R, C, scale, *k_NSGC.stride()[:3]), {
        "BLOCK_R": block_r,
        "BLOCK_S": block_s,
        "BLOCK_C": block_c,
    }


def _forward(q_NHC: Tensor, k_NSGC: Tensor, v_NSGC: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(q_NHC), q_NHC.new_empty(q_NHC.shape[:2], dtype=torch.float32)
    numbers, constants = _arguments(q_NHC, k_NSGC, scale)
    launch(
        _forward_kernel,
        (len(q_NHC), k_NSGC.size(2)),
        q_NHC,
        k_NSGC,
        v_NSGC,
        out,
        lse,
        *numbers,
        constants=constants,
    )
    return out, lse


def _backward(
    grad: Tensor,
    q_NHC: Tensor,
    k_NSGC: Tensor,
    v_NSGC: Tensor,
    lse_NH: Tensor,
    delta_NH: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = torch.empty_like(q_NHC), *(k_NSGC.new_empty(k_NSGC.shape) for _ in range(2))
    numbers, constants = _arguments(q_NHC, k_NSGC, scale)
    launch(
        _backward_kernel, (len(q_NHC), k_NSGC.size(2)), grad, q_NHC, k_NSGC, v_NSGC, lse_NH, delta_NH,
        grad_q, grad_k, grad_v,
        *numbers, constants=constants,
    )  # fmt: skip
    return grad_q, grad_k, grad_v


_op = custom_op("hybridtrain::depth_attention", _forward, mutates_args=())
_op_backward = custom_op("hybridtrain::depth_attention_backward", _backward, mutates_args=())


@_op.register_fake
def _(q_NHC: Tensor, k_NSGC: Tensor, v_NSGC: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q_NHC), q_NHC.new_empty(q_NHC.shape[:2], dtype=torch.float32)


@_op_backward.register_fake
def _(
    grad: Tensor,
    q_NHC: Tensor,
    k_NSGC: Tensor,
    v_NSGC: Tensor,
    lse_NH: Tensor,
    delta_NH: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q_NHC), k_NSGC.new_empty(k_NSGC.shape), v_NSGC.new_empty(v_NSGC.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    delta = (grad.float() * out.float()).sum(-1) - grad_lse
    return *_op_backward(grad.contiguous(), q, k, v, lse, delta, ctx.scale), None


_op.register_autograd(_gradients, setup_context=_setup)


def depth_attention(q_NHC: Tensor, k_NSGC: Tensor, v_NSGC: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As reference.depth_attention; the log-sum-exp is float32 and has a gradient too, so `merge` may follow.

    Keys and values must lie alike, a head's C elements in one piece. Raises ValueError where shapes or
    strides do not fit.
    """
    N, H, C = q_NHC.shape
    fits = (
        k_NSGC.shape == v_NSGC.shape
        and k_NSGC.shape[::3] == (N, C)
        and k_NSGC.size(1) > 0
        and H % k_NSGC.size(2) == 0
    )
    if not fits or k_NSGC.stride() != v_NSGC.stride() or k_NSGC.stride(3) != 1:
        raise ValueError(
            f"q {list(q_NHC.shape)}, k {list(k_NSGC.shape)} and v {list(v_NSGC.shape)} must be [N, H, C] and "
            f"twice [N, S, G, C] with S at least 1 and H a multiple of G; strides {k_NSGC.stride()} and "
            f"{v_NSGC.stride()} must be equal and end in 1"
        )
    out: tuple[Tensor, Tensor] = _op(q_NHC.contiguous(), k_NSGC, v_NSGC, scale)
    return out


def depth_gradients(
    grad: Tensor,
    q_NHC: Tensor,
    k_NSGC: Tensor,
    v_NSGC: Tensor,
    lse_NH: Tensor,
    delta_NH: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v where the slots are part of a larger softmax with the global log-sum-exp
    `lse_NH`.

    grad: of the global output; delta_NH: its product with that output, summed over C. For sequence attentions
    (FlashAttention) whose log-sum-exp has no gradient: their backward, given the same two, makes the other
    part.
    """
    gradients: tuple[Tensor, Tensor, Tensor] = _op_backward(
        grad.contiguous(), q_NHC, k_NSGC, v_NSGC, lse_NH, delta_NH, scale
    )
    return gradients


def cases() -> Iterator[Case]:
    """32 query heads on 8 key heads, 32 slots of 64."""
    N, S, C = 8192, 32, 64
    q = torch.empty(N, 32, C, dtype=torch.bfloat16, device="meta")
    k, lse = q.new_empty(N, S, 8, C), q.new_empty(N, 32, dtype=torch.float32)
    shape, inputs = f"N={N} H=32 G=8 S={S} C={C}", num_bytes(q, k, k)
    yield Case(
        "depth_attention", f"forward {shape}", lambda: _forward(q, k, k, 0.125), inputs + num_bytes(q, lse)
    )
    back = lambda: _backward(q, q, k, k, lse, lse, 0.125)  # noqa: E731
    yield Case("depth_attention", f"backward {shape}", back, 2 * inputs + num_bytes(q, lse, lse))
