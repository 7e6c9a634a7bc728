"""The grouped SwiGLU on `grouped_mm`, CPU and CUDA alike.

On the CPU a hand-written autograd function over one product per expert was measured against it and was no
faster (8 experts) or 3 to 10 % slower (64 experts): the loop over experts is in C++ here.

P rows sorted by expert, E experts, D width, F hidden width. See reference.py for the definition.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridtrain.kernels.choose import TORCH, Backends, Op
from hybridtrain.kernels.swiglu.op import swiglu

GROUPED_MLP = Op(
    "grouped_mlp",
    "torch grouped_mm",
    ("torch", "triton", "fp8"),  # fp8: Triton's with FP8 operands
    on_gpu="torch",  # cuBLAS' grouped products, at full speed
    sources=("grouped_mlp.kernel", "grouped_mlp.fp8"),
    keeps=("_grouped_mm",),
)


def grouped_swiglu(
    x_PD: Tensor,
    counts_E: Tensor,
    w_gate_EDF: Tensor,
    w_up_EDF: Tensor,
    w_down_EFD: Tensor,
    backends: Backends = TORCH,
) -> Tensor:
    """The first counts[0] rows through expert 0, the next counts[1] through expert 1, and so on: [P, D].

    `counts_E` (int64, on the device of `x_PD`) sums to P: rows beyond its sum would come out uninitialised.
    Raises ValueError where D or F rows are not multiples of 16 bytes, which `grouped_mm` needs.
    """
    match backends.of(GROUPED_MLP, x_PD):
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
    gate_PF, up_PF = (F.grouped_mm(x_PD, w, offs=ends_E) for w in (w_gate_EDF, w_up_EDF))
    hidden_PF = swiglu(gate_PF, up_PF, backends)
    return F.grouped_mm(hidden_PF, w_down_EFD, offs=ends_E)
