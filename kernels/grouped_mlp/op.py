"""The grouped SwiGLU: one product per expert on the CPU, `grouped_mm` on CUDA.

P rows sorted by expert, E experts, D width, F hidden width. See reference.py for the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_swiglu(x_PD: Tensor, counts_E: Tensor, w_gate_EDF: Tensor, w_up_EDF: Tensor, w_down_EFD: Tensor) -> Tensor:
    """The first counts[0] rows through expert 0, the next counts[1] through expert 1, and so on: [P, D].

    `counts_E` is int64 and sums to P. On CUDA it stays on the device, and rows must be multiples of 16 bytes.
    """
    if x_PD.is_cuda:
        return _grouped_mm(x_PD, counts_E, w_gate_EDF, w_up_EDF, w_down_EFD)
    return _expert_loop(x_PD, counts_E.tolist(), w_gate_EDF, w_up_EDF, w_down_EFD)


def _grouped_mm(x_PD: Tensor, counts_E: Tensor, w_gate_EDF: Tensor, w_up_EDF: Tensor, w_down_EFD: Tensor) -> Tensor:
    ends_E = counts_E.cumsum(0).to(torch.int32)
    hidden_PF = F.silu(F.grouped_mm(x_PD, w_gate_EDF, offs=ends_E)) * F.grouped_mm(x_PD, w_up_EDF, offs=ends_E)
    return F.grouped_mm(hidden_PF, w_down_EFD, offs=ends_E)


class _ExpertLoop(torch.autograd.Function):
    """Expert by expert, so that an expert's activations are still in cache for the next of its operations."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, counts: list[int], w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        gate_PF = x_PD.new_empty(x_PD.size(0), w_gate.size(2))
        up_PF = torch.empty_like(gate_PF)
        y_PD = torch.empty_like(x_PD)
        start = 0
        for e, count in enumerate(counts):
            if count:
                rows = slice(start, start + count)
                gate = torch.mm(x_PD[rows], w_gate[e], out=gate_PF[rows])
                up = torch.mm(x_PD[rows], w_up[e], out=up_PF[rows])
                torch.mm(F.silu(gate).mul_(up), w_down[e], out=y_PD[rows])
                start += count
        ctx.counts = counts
        ctx.save_for_backward(x_PD, gate_PF, up_PF, w_gate, w_up, w_down)
        return y_PD

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor | None, ...]:
        x_PD, gate_PF, up_PF, w_gate, w_up, w_down = ctx.saved_tensors
        grad_PD = grad_PD.contiguous()
        grad_x = torch.empty_like(x_PD)
        grad_gate_w, grad_up_w, grad_down_w = torch.empty_like(w_gate), torch.empty_like(w_up), torch.empty_like(w_down)
        start = 0
        for e, count in enumerate(ctx.counts):
            if not count:
                for grad in (grad_gate_w, grad_up_w, grad_down_w):
                    grad[e].zero_()
                continue
            rows = slice(start, start + count)
            x, gate, up, grad_y = x_PD[rows], gate_PF[rows], up_PF[rows], grad_PD[rows]
            grad_hidden = grad_y @ w_down[e].t()
            silu = F.silu(gate)
            torch.mm((silu * up).t(), grad_y, out=grad_down_w[e])
            grad_up = silu.mul_(grad_hidden)
            grad_gate = torch.ops.aten.silu_backward(grad_hidden.mul_(up), gate)
            torch.mm(x.t(), grad_gate, out=grad_gate_w[e])
            torch.mm(x.t(), grad_up, out=grad_up_w[e])
            torch.mm(grad_gate, w_gate[e].t(), out=grad_x[rows])
            grad_x[rows].addmm_(grad_up, w_up[e].t())
            start += count
        return grad_x, None, grad_gate_w, grad_up_w, grad_down_w


_expert_loop: Callable[[Tensor, list[int], Tensor, Tensor, Tensor], Tensor] = _ExpertLoop.apply
