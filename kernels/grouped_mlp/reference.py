"""The definition of the grouped SwiGLU. P rows sorted by expert, E experts, D width, F hidden width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_swiglu(x_PD: Tensor, counts_E: Tensor, w_gate_EDF: Tensor, w_up_EDF: Tensor, w_down_EFD: Tensor) -> Tensor:
    """The first counts[0] rows through expert 0, the next counts[1] through expert 1, and so on: [P, D]."""
    rows = torch.split(x_PD, counts_E.tolist())
    return torch.cat([(F.silu(x @ w_gate_EDF[e]) * (x @ w_up_EDF[e])) @ w_down_EFD[e] for e, x in enumerate(rows)])
