"""The definition of the grouped SwiGLU. P rows sorted by expert, E experts, D width, F hidden width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_swiglu(
    x_PD: Tensor, counts_E: Tensor, w_gate_EDF: Tensor, w_up_EDF: Tensor, w_down_EFD: Tensor
) -> Tensor:
    """The first counts[0] rows through expert 0, the next counts[1] through expert 1, and so on: [P, D]."""
    rows = torch.split(x_PD, counts_E.tolist())
    return torch.cat(
        [(F.silu(x @ w_gate_EDF[e]) * (x @ w_up_EDF[e])) @ w_down_EFD[e] for e, x in enumerate(rows)]
    )


def quantise(x_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in FP8 (e4m3) and the scales [R] they are to be multiplied by: a row's greatest magnitude becomes
    FP8's, 448.
    """
    scale_R = x_RC.abs().amax(-1).float() / torch.finfo(torch.float8_e4m3fn).max
    scale_R = scale_R.where(scale_R > 0, 1.0)
    return (x_RC.float() / scale_R[:, None]).to(torch.float8_e4m3fn), scale_R
