"""The definition of SwiGLU's elementwise part (arXiv 2002.05202)."""

from __future__ import annotations

from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up."""
    return gate * gate.sigmoid() * up
