"""SwiGLU's elementwise part in Triton: one pass each way, float32 inside, nothing saved but the inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from hybridtrain.kernels.launch import Case, ceil_div, launch, num_bytes

BLOCK = 2048


@triton.jit
def _forward_kernel(gate_ptr, up_ptr, out_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    slope = share * (1.0 + gate * (1.0 - share))
    tl.store(grad_gate_ptr + at, (grad * up * slope).to(grad_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_up_ptr + at, (grad * gate * share).to(grad_up_ptr.dtype.element_ty), mask=inside)


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    N = gate.numel()
    launch(_forward_kernel, (ceil_div(N, BLOCK),), gate, up, out, N, constants={"BLOCK": BLOCK})
    return out


def _backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    N = gate.numel()
    launch(
        _backward_kernel,
        (ceil_div(N, BLOCK),),
        grad,
        gate,
        up,
        grad_gate,
        grad_up,
        N,
        constants={"BLOCK": BLOCK},
    )
    return grad_gate, grad_up


_op = custom_op("hybridtrain::swiglu", _forward, mutates_args=())
_op_backward = custom_op("hybridtrain::swiglu_backward", _backward, mutates_args=())


@_op.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@_op_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = _op_backward(grad.contiguous(), *ctx.saved_tensors)
    return out


_op.register_autograd(_gradients, setup_context=_setup)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape and dtype. Raises ValueError where they differ."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate {list(gate.shape)} {gate.dtype} and up {list(up.shape)} {up.dtype} must be alike"
        )
    out: Tensor = _op(gate.contiguous(), up.contiguous())
    return out


def cases() -> Iterator[Case]:
    """A dense layer's hidden state, both ways."""
    gate = torch.empty(16384, 11008, dtype=torch.bfloat16, device="meta")
    size = num_bytes(gate)
    yield Case("swiglu", "forward N=16384 F=11008", lambda: _forward(gate, gate), 3 * size)
    yield Case("swiglu", "backward N=16384 F=11008", lambda: _backward(gate, gate, gate), 5 * size)
