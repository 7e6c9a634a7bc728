"""The permutation with hand-written gradients: gathers both ways, no scatter, no atomics, one fixed order of
summation.

N tokens, K experts per token, P = N*K pairs, D width. See reference.py for the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hybridtrain.kernels.choose import TORCH, Backends, Op
from hybridtrain.kernels.permute import reference
from hybridtrain.kernels.rows.op import row_gather

PERMUTE = Op("permute", "torch index_select, own backward", sources=("permute.kernel",))


def sort_by_destination(
    experts_NK: Tensor, num_experts: int, num_ranks: int, backends: Backends = TORCH
) -> tuple[Tensor, Tensor, Tensor]:
    """(order_Q, inverse_NK, asked_R2) of tokens that go once to every rank that has one of their experts; see
    reference.py.
    """
    if backends.of(PERMUTE, experts_NK) == "triton":
        from hybridtrain.kernels.permute import kernel

        return kernel.sort_by_destination(experts_NK, num_experts, num_ranks)
    return reference.sort_by_destination(experts_NK, num_experts, num_ranks)


def spread(x_ND: Tensor, order_P: Tensor, inverse_NK: Tensor, backends: Backends = TORCH) -> Tensor:
    """`permute` of pairs that stand for others: `inverse_NK` may be -1."""
    if backends.of(PERMUTE, x_ND) == "triton":
        from hybridtrain.kernels.permute import kernel

        return kernel.permute(x_ND, order_P, inverse_NK)
    return row_gather(x_ND, order_P // inverse_NK.size(1), backends)


def collect(y_PD: Tensor, order_P: Tensor, inverse_NK: Tensor, backends: Backends = TORCH) -> Tensor:
    """Each token's sum over the rows of its pairs: [N, D]; `inverse_NK` may be -1."""
    if backends.of(PERMUTE, y_PD) == "triton":
        from hybridtrain.kernels.permute import kernel

        return kernel.combine(y_PD, None, order_P, inverse_NK)
    wide_PD = y_PD.to(_wide(y_PD))
    out_ND = wide_PD.new_zeros(len(inverse_NK), y_PD.size(1)).index_add(
        0, order_P // inverse_NK.size(1), wide_PD
    )
    return out_ND.to(y_PD.dtype)


def permute(x_ND: Tensor, order_P: Tensor, inverse_NK: Tensor, backends: Backends = TORCH) -> Tensor:
    """Row i of the result is the token of the i-th pair: [P, D]."""
    if backends.of(PERMUTE, x_ND) == "triton":
        from hybridtrain.kernels.permute import kernel

        return kernel.permute(x_ND, order_P, inverse_NK)
    return _permute(x_ND, order_P, inverse_NK)


def combine(
    y_PD: Tensor, gates_NK: Tensor, order_P: Tensor, inverse_NK: Tensor, backends: Backends = TORCH
) -> Tensor:
    """Each token's sum over its pairs, weighted by the gates, k rising: [N, D] in the dtype of `y_PD`."""
    if backends.of(PERMUTE, y_PD) == "triton":
        from hybridtrain.kernels.permute import kernel

        return kernel.combine(y_PD, gates_NK, order_P, inverse_NK)
    return _combine(y_PD, gates_NK, order_P, inverse_NK)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_P: Tensor, inverse_NK: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_NK)
        return x_ND.index_select(0, order_P // inverse_NK.size(1))

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_NK,) = ctx.saved_tensors
        grad_ND = grad_PD.index_select(0, inverse_NK[:, 0]).to(_wide(grad_PD))
        for k in range(1, inverse_NK.size(1)):
            grad_ND += grad_PD.index_select(0, inverse_NK[:, k])
        return grad_ND.to(grad_PD.dtype), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_PD: Tensor, gates_NK: Tensor, order_P: Tensor, inverse_NK: Tensor) -> Tensor:
        ctx.save_for_backward(y_PD, gates_NK, order_P, inverse_NK)
        gates = gates_NK.to(_wide(y_PD))
        out_ND = y_PD.index_select(0, inverse_NK[:, 0]) * gates[:, :1]  # in the wider type
        for k in range(1, inverse_NK.size(1)):
            out_ND.addcmul_(y_PD.index_select(0, inverse_NK[:, k]), gates[:, k : k + 1])
        return out_ND.to(y_PD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_PD, gates_NK, order_P, inverse_NK = ctx.saved_tensors
        grad_PD = grad_ND.index_select(0, order_P // inverse_NK.size(1))
        grad_gates_P = (
            torch.linalg.vecdot(y_PD, grad_PD)
            if y_PD.dtype == torch.float32
            else (y_PD.float() * grad_PD).sum(-1)
        )
        grad_gates_NK = grad_gates_P[inverse_NK].to(gates_NK.dtype)
        grad_PD *= gates_NK.reshape(-1, 1)[order_P].to(grad_PD.dtype)
        return grad_PD, grad_gates_NK, None, None


def _wide(values: Tensor) -> torch.dtype:
    """The type in which values of this type are added up."""
    return torch.promote_types(values.dtype, torch.float32)


_permute: Callable[[Tensor, Tensor, Tensor], Tensor] = _Permute.apply
_combine: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = _Combine.apply
