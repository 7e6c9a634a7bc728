"""How a component reaches tokens and experts on other ranks. The exchanges here are those of one device.

A component takes these as an argument when it is built, so `parallel/` can hand in others, which reach
over ranks. Legend: B sequences, T tokens, H heads, C head width, D model width, W channels, N = B*T,
K experts per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridtrain.kernels.choose import TORCH, Backends
from hybridtrain.kernels.document_attention.op import document_attention
from hybridtrain.kernels.engram.op import ConvRule, short_conv
from hybridtrain.kernels.linear_cross_entropy.op import linear_cross_entropy_sum
from hybridtrain.model.common import SequenceContext
from hybridtrain.model.scan import scan

IGNORED = -100

Attend = Callable[[Tensor, Tensor, Tensor, SequenceContext], Tensor]
"""Causal softmax attention inside documents: (q_BTHC, k_BTHC, v_BTHC, context) → [B, T, H, C]."""

Scan = Callable[[Tensor, Tensor, SequenceContext], Tensor]
"""h_t = factor_t * h_(t-1) + input_t from h = 0 at every document's start: (factor_BTW, input_BTW, context) →
h [B, T, W]."""

Convolve = Callable[[Tensor, Tensor, Tensor, Tensor | None, ConvRule], Tensor]
"""The short convolution with its norm, inside documents: (x_BTD, weight_D, kernel_JD, documents_BT, rule) →
[B, T, D]; see kernels/engram."""


class Dispatch(Protocol):
    """Begins to bring tokens to their experts. What it returns is called once and gives each token's gated
    sum over its experts, [N, D]; what is computed in between runs while the tokens travel, if they do."""

    def __call__(
        self, x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor, experts: Callable[..., Tensor]
    ) -> Callable[[], Tensor]: ...


def attend(q_BTHC: Tensor, k_BTHC: Tensor, v_BTHC: Tensor, context: SequenceContext) -> Tensor:
    """Softmax attention of whole sequences on this device: [B, T, H, C]."""
    if context.spans is not None:
        return document_attention(q_BTHC, k_BTHC, v_BTHC, context.documents_BT, context.spans)
    out_BHTC = F.scaled_dot_product_attention(
        q_BTHC.transpose(1, 2),
        k_BTHC.transpose(1, 2),
        v_BTHC.transpose(1, 2),
        attn_mask=context.mask_B1TT,
        is_causal=context.mask_B1TT is None,
        enable_gqa=k_BTHC.size(2) != q_BTHC.size(2),
    )
    return out_BHTC.transpose(1, 2)


def position_in_expert(experts_BTK: Tensor) -> Tensor:
    """How many earlier tokens of the same sequence chose the same expert: [B, T, K] int64.

    A token's experts are distinct.
    """
    sorted_BP, order_BP = experts_BTK.flatten(1).sort(stable=True)
    first_BP = torch.searchsorted(sorted_BP, sorted_BP)  # where the expert's line begins
    place_BP = torch.arange(order_BP.size(1), device=order_BP.device) - first_BP
    return torch.empty_like(order_BP).scatter_(1, order_BP, place_BP).view(experts_BTK.shape)


def local_dispatch(num_experts: int, drops: bool, path: str) -> Dispatch:
    """All experts are on this device. With `drops`, pairs may be absent: their experts lie outside 0..E-1."""

    def dispatch(
        x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor, experts: Callable[..., Tensor]
    ) -> Callable[[], Tensor]:
        y_ND = experts(x_ND, experts_NK, gates_NK, absent=drops)
        return lambda: y_ND

    return dispatch


def head_loss(h_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, backends: Backends = TORCH) -> Tensor:
    """Summed cross-entropy in nats of the logits h @ weight^T, which are never held all at once on the CPU;
    targets of -100 do not count."""
    return linear_cross_entropy_sum(h_BTD.flatten(0, -2), weight_VD, targets_BT.flatten(), IGNORED, backends)


@dataclass(frozen=True)
class Exchanges:
    """Handed to whatever builds a part of a model.

    dispatch: (number of experts, whether pairs may be dropped, path for messages) → `Dispatch`
    logits: (h_BTD, weight_VD) → [B, T, V]
    """

    attend: Attend = attend
    scan: Scan = scan
    convolve: Convolve = short_conv
    position_in_expert: Callable[[Tensor], Tensor] = position_in_expert
    dispatch: Callable[[int, bool, str], Dispatch] = local_dispatch
    head_loss: Callable[[Tensor, Tensor, Tensor], Tensor] = head_loss
    logits: Callable[[Tensor, Tensor], Tensor] = F.linear


LOCAL = Exchanges()
"""All of a model on one device."""


def local_exchanges(backends: Backends) -> Exchanges:
    """Those of a model on one device, carried by `backends`."""
    return Exchanges(
        convolve=partial(short_conv, backends=backends), head_loss=partial(head_loss, backends=backends)
    )
