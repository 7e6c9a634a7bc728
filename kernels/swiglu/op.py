"""silu(gate) * up: torch's two passes, or one fused. See reference.py for the definition."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hybridtrain.kernels.choose import TORCH, Backends, Op

SWIGLU = Op("swiglu", "torch, two passes", ("torch", "triton", "liger"), sources=("swiglu.kernel",))


def swiglu(gate: Tensor, up: Tensor, backends: Backends = TORCH) -> Tensor:
    """silu(gate) * up, of one shape and dtype."""
    match backends.of(SWIGLU, gate):
        case "triton":
            from hybridtrain.kernels.swiglu.kernel import swiglu as fused

            return fused(gate, up)
        case "liger":
            from hybridtrain.kernels.libraries import liger_swiglu

            return liger_swiglu(gate, up)
    return F.silu(gate) * up
