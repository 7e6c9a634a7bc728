"""The grouped SwiGLU on `grouped_mm`, CPU and CUDA alike.

On the CPU a hand-written autograd function over one product per expert was measured against it and was no
faster (8 experts) or 3 to 10 % slower (64 experts): the loop over experts is in C++ here.

P rows sorted by expert, E experts, D width, F hidden width. See reference.py for the definition.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridtrain.kernels.choose import chosen
from hybridtrain.kernels.swiglu.op import swiglu


def grouped_swiglu(
    x_PD: Tensor, counts_E: Tensor, w_gate_EDF: Tensor, w_up_EDF: Tensor, w_down_EFD: Tensor
) -> Tensor:
    """The first counts[0] rows through expert 0, the next counts[1] through expert 1, and so on: [P, D].

    `counts_E` (int64, on the device of `x_PD`) sums to P: rows beyond its sum would come out uninitialised.
    Raises ValueError where D or F rows are no multiples of 16 bytes, which `grouped_mm` needs.
    """
    match chosen("grouped_mlp", x_PD):
        case "triton":
            from hybridtrain.kernels.grouped_mlp.kernel import grouped_swiglu as fused

            return fused(x_PD, counts_E, w_gate_EDF, w_up_EDF, w_down_EFD)
        case "fp8":
            from hybridtrain.kernels.grouped_mlp.fp8 import grouped_swiglu as fused_fp8

            return fused_fp8(x_PD, counts_E, w_gate_EDF, w_up_EDF, w_down_EFD)
    step = 16 // x_PD.element_size()
    if x_PD.size(1) % step or w_gate_EDF.size(2) % step:
        raise ValueError(
            f"grouped experts need widths that are multiples of {step} in {x_PD.dtype}; "
            f"got model width {x_PD.size(1)} and expert width {w_gate_EDF.size(2)}"
        )
    ends_E = counts_E.cumsum(0).to(torch.int32)
    hidden_PF = swiglu(F.grouped_mm(x_PD, w_gate_EDF, offs=ends_E), F.grouped_mm(x_PD, w_up_EDF, offs=ends_E))
    return F.grouped_mm(hidden_PF, w_down_EFD, offs=ends_E)
