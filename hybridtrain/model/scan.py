"""Linear recurrences along a sequence: h_t = factor_t * h_(t-1) + input_t, elementwise.

Legend: B sequences, T tokens, W channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridtrain.model.common import SequenceContext


def scan(factor_BTW: Tensor, input_BTW: Tensor, context: SequenceContext) -> Tensor:
    """h [B, T, W] of whole sequences on this device, from h = 0 at every document's start."""
    _, state_BTW = affine_scan(stop_at_documents(factor_BTW, context.documents_BT), input_BTW)
    return state_BTW


def stop_at_documents(factor_BTW: Tensor, documents_BT: Tensor | None) -> Tensor:
    """The factors, zero at the first token of every document."""
    if documents_BT is None:
        return factor_BTW
    same_BT = documents_BT[:, 1:] == documents_BT[:, :-1]
    return torch.cat([factor_BTW[:, :1], factor_BTW[:, 1:] * same_BT[..., None]], dim=1)


def affine_scan(factor_BTW: Tensor, input_BTW: Tensor) -> tuple[Tensor, Tensor]:
    """(product of the factors up to each token, h_t = factor_t * h_(t-1) + input_t from h = 0): [B, T, W]
    both.

    By doubling (Hillis and Steele 1986): log2(T) passes, each joining every token with the one 2^i before.
    """
    product_BTW, state_BTW, step = factor_BTW, input_BTW, 1
    while step < factor_BTW.size(1):
        before_state, before_product = state_BTW[:, :-step], product_BTW[:, :-step]
        joined = state_BTW[:, step:] + product_BTW[:, step:] * before_state
        state_BTW = torch.cat([state_BTW[:, :step], joined], dim=1)
        product_BTW = torch.cat([product_BTW[:, :step], product_BTW[:, step:] * before_product], dim=1)
        step *= 2
    return product_BTW, state_BTW
