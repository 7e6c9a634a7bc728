"""The experts from tokens to tokens: on the CPU expert by expert in threads of one core each, elsewhere by
grouped products.

On the CPU nothing of [pairs, D] is gathered beforehand or weighted afterwards: an expert's tokens are
gathered, multiplied and weighted while they lie in a core's cache, and its hidden rows take the gates, which
are narrower. Sums have one order, whatever the number of threads.

N tokens, K choices per token, P = N*K pairs sorted by expert, E experts, D width, F hidden width, M pairs of
one expert. See reference.py for the definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridtrain.kernels.choose import chosen
from hybridtrain.kernels.grouped_mlp.op import grouped_swiglu
from hybridtrain.kernels.moe_swiglu.threads import share_out
from hybridtrain.kernels.permute.op import combine, permute, sort_by_expert

_silu, _silu_backward = torch.ops.aten.silu.out, torch.ops.aten.silu_backward.grad_input


def moe_swiglu(
    x_ND: Tensor,
    experts_NK: Tensor,
    gates_NK: Tensor,
    w_gate_EDF: Tensor,
    w_up_EDF: Tensor,
    w_down_EFD: Tensor,
    absent: bool = False,
    present: int | None = None,
) -> Tensor:
    """Each token's gated sum over its experts: [N, D] in the dtype of `x_ND`.

    `experts_NK` int64 in [0, E). With `absent`, choices outside of it count nothing. `present` is how many
    are inside, for a caller who knows: without it grouped products take the others along as rows of zeros,
    since to ask would wait for the device.
    """
    num_experts, num_pairs = len(w_gate_EDF), experts_NK.numel()
    if absent:
        experts_NK = experts_NK.where(
            (experts_NK >= 0) & (experts_NK < num_experts), num_experts
        )  # sorted behind all others
    order_P, inverse_NK, counts = sort_by_expert(experts_NK, num_experts + absent)
    counts_E = counts[:num_experts]
    if _fused_here(x_ND, w_gate_EDF):
        return _moe_swiglu(
            x_ND, gates_NK, order_P, inverse_NK, counts_E.tolist(), w_gate_EDF, w_up_EDF, w_down_EFD
        )
    x_PD = permute(x_ND, order_P, inverse_NK)
    if absent and present is None:
        x_PD, counts_E = _absent_as_zeros(x_PD, counts_E)
    there = num_pairs if present is None else present
    y_PD = grouped_swiglu(x_PD[:there], counts_E, w_gate_EDF, w_up_EDF, w_down_EFD)
    return combine(
        F.pad(y_PD, (0, 0, 0, num_pairs - there)) if there < num_pairs else y_PD,
        gates_NK,
        order_P,
        inverse_NK,
    )


def _absent_as_zeros(x_PD: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor]:
    """The rows behind those of all experts, set to zero and handed to the last one: zero is all that comes
    out, and all that their gradients add to any weight."""
    total = counts_E.sum()
    absent_P = torch.arange(len(x_PD), device=x_PD.device) >= total
    return x_PD.masked_fill(absent_P[:, None], 0), torch.cat(
        [counts_E[:-1], counts_E[-1:] + (len(x_PD) - total)]
    )


def _fused_here(x_ND: Tensor, w_gate_EDF: Tensor) -> bool:
    return (
        x_ND.device.type == "cpu"
        and x_ND.dtype == w_gate_EDF.dtype
        and chosen("grouped_mlp", x_ND) == "torch"
    )


class _MoESwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        gates_NK: Tensor,
        order_P: Tensor,
        inverse_NK: Tensor,
        counts: list[int],
        w_gate_EDF: Tensor,
        w_up_EDF: Tensor,
        w_down_EFD: Tensor,
    ) -> Tensor:
        order_P, inverse_NK = (
            order_P[: sum(counts)],
            inverse_NK.clamp_max(sum(counts)),
        )  # absent: the row of zeros at the end
        token_P = order_P // inverse_NK.size(1)
        weight_P1 = gates_NK.reshape(-1)[order_P].to(x_ND.dtype)[:, None]
        gate_PF, up_PF = (x_ND.new_empty(len(order_P), w_gate_EDF.size(2)) for _ in range(2))
        y_PD = _with_zero_row(x_ND, len(order_P))

        tokens, weights, gates, ups, outs = (
            t.split(counts) for t in (token_P, weight_P1, gate_PF, up_PF, y_PD[:-1])
        )
        w_gate, w_up, w_down = (w.unbind() for w in (w_gate_EDF, w_up_EDF, w_down_EFD))

        def work(experts: Iterator[int]) -> None:
            x_MD, hidden_MF = (
                x_ND.new_empty(max(counts), width) for width in (x_ND.size(1), gate_PF.size(1))
            )
            for e in experts:
                x = torch.index_select(x_ND, 0, tokens[e], out=x_MD[: counts[e]])
                torch.mm(x, w_gate[e], out=gates[e])
                torch.mm(x, w_up[e], out=ups[e])
                hidden = _silu(gates[e], out=hidden_MF[: counts[e]]).mul_(ups[e]).mul_(weights[e])
                torch.mm(hidden, w_down[e], out=outs[e])

        share_out(work, _largest_first(counts))
        ctx.counts = counts
        ctx.save_for_backward(
            x_ND, gates_NK, inverse_NK, token_P, weight_P1, gate_PF, up_PF, w_gate_EDF, w_up_EDF, w_down_EFD
        )
        return F.embedding_bag(inverse_NK, y_PD, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gates_NK, inverse_NK, token_P, weight_P1, gate_PF, up_PF, w_gate_EDF, w_up_EDF, w_down_EFD = (
            ctx.saved_tensors
        )
        counts, (width, hidden_width) = ctx.counts, w_gate_EDF.shape[1:]
        grad_x_PD, grad_weight_P = _with_zero_row(x_ND, len(token_P)), x_ND.new_zeros(len(token_P) + 1)
        grad_gate_EDF, grad_up_EDF, grad_down_EFD = (
            torch.empty_like(w) for w in (w_gate_EDF, w_up_EDF, w_down_EFD)
        )

        per_pair = (token_P, weight_P1, gate_PF, up_PF, grad_x_PD[:-1], grad_weight_P[:-1])
        tokens, weights, gates, ups, grad_xs, grad_weights = (t.split(counts) for t in per_pair)
        w_gate_t, w_up_t, w_down_t = (w.mT.unbind() for w in (w_gate_EDF, w_up_EDF, w_down_EFD))
        grads_gate, grads_up, grads_down = (w.unbind() for w in (grad_gate_EDF, grad_up_EDF, grad_down_EFD))

        def work(experts: Iterator[int]) -> None:
            x_MD, grad_MD = (x_ND.new_empty(max(counts), width) for _ in range(2))
            buffers = [x_ND.new_empty(max(counts), hidden_width) for _ in range(4)]
            for e in experts:
                silu_MF, hidden_MF, grad_MF, product_MF = (buffer[: counts[e]] for buffer in buffers)
                x = torch.index_select(x_ND, 0, tokens[e], out=x_MD[: counts[e]])
                grad_y = torch.index_select(grad_ND, 0, tokens[e], out=grad_MD[: counts[e]])
                silu = _silu(gates[e], out=silu_MF)
                hidden = torch.mul(silu, ups[e], out=hidden_MF)
                grad = torch.mm(grad_y, w_down_t[e], out=grad_MF)
                torch.sum(torch.mul(grad, hidden, out=product_MF), -1, out=grad_weights[e])
                torch.mm(hidden.mul_(weights[e]).t(), grad_y, out=grads_down[e])
                grad_up = silu.mul_(grad.mul_(weights[e]))
                grad_gate = _silu_backward(grad.mul_(ups[e]), gates[e], grad_input=grad)
                torch.mm(x.t(), grad_gate, out=grads_gate[e])
                torch.mm(x.t(), grad_up, out=grads_up[e])
                torch.mm(grad_gate, w_gate_t[e], out=grad_xs[e]).addmm_(grad_up, w_up_t[e])

        share_out(work, _largest_first(counts))
        grad_gates_NK = grad_weight_P[inverse_NK].to(gates_NK.dtype)
        grad_x_ND = F.embedding_bag(inverse_NK, grad_x_PD, mode="sum")
        return grad_x_ND, grad_gates_NK, None, None, None, grad_gate_EDF, grad_up_EDF, grad_down_EFD


def _with_zero_row(x_ND: Tensor, num_pairs: int) -> Tensor:
    """[P + 1, D], uninitialised but for zeros in the last row."""
    out = x_ND.new_empty(num_pairs + 1, x_ND.size(1))
    out[-1] = 0
    return out


def _largest_first(counts: list[int]) -> list[int]:
    """The experts in an order in which threads that take one after the other end together."""
    return sorted(range(len(counts)), key=lambda e: -counts[e])


_moe_swiglu: Callable[..., Tensor] = _MoESwiGLU.apply
