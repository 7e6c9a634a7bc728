"""silu(gate) * up: torch's two passes, or one fused. See reference.py for the definition."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hybridtrain.kernels.choose import chosen


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape and dtype."""
    match chosen("swiglu", gate):
        case "triton":
            from hybridtrain.kernels.swiglu.kernel import swiglu as fused

            return fused(gate, up)
        case "liger":
            from liger_kernel.transformers.functional import liger_swiglu

            out: Tensor = liger_swiglu(gate, up)
            return out
    return F.silu(gate) * up
