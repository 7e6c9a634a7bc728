"""The short convolution behind the memory's gate: Triton in one pass forward and two back, or torch tap by
tap.

B batch, T tokens, D width, J taps. See reference.py for the definition.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hybridtrain.kernels.choose import chosen
from hybridtrain.kernels.rms_norm.op import rms_norm


def short_conv(
    u_BTD: Tensor, weight_D: Tensor, kernel_JD: Tensor, documents_BT: Tensor | None, dilation: int, eps: float
) -> Tensor:
    """SiLU(conv(RMSNorm(u))) + u; tap j reads (J-1-j)*dilation tokens back, never across a document start.

    `documents_BT` numbers the documents of a sequence; None: one each.
    """
    if chosen("short_conv", u_BTD) == "triton":
        from hybridtrain.kernels.short_conv.kernel import short_conv as fused

        return fused(u_BTD, weight_D, kernel_JD, documents_BT, dilation, eps)
    return F.silu(_convolve(rms_norm(u_BTD, weight_D, eps), kernel_JD, documents_BT, dilation)) + u_BTD


def _convolve(x_BTD: Tensor, kernel_JD: Tensor, documents_BT: Tensor | None, dilation: int) -> Tensor:
    taps, seq_len = kernel_JD.size(0), x_BTD.size(1)
    out_BTD = x_BTD * kernel_JD[-1]
    for j in range(taps - 1):
        back = (taps - 1 - j) * dilation
        if back >= seq_len:
            continue
        term_BTD = x_BTD[:, :-back] * kernel_JD[j]
        if documents_BT is not None:
            term_BTD = term_BTD * (documents_BT[:, back:] == documents_BT[:, :-back])[:, :, None]
        out_BTD = out_BTD + F.pad(term_BTD, (0, 0, back, 0))
    return out_BTD
