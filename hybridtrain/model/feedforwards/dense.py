"""The dense SwiGLU (arXiv 2002.05202): w_down(silu(w_gate x) * w_up x)."""

from __future__ import annotations

from torch import Tensor, nn

from hybridtrain.kernels.swiglu.op import swiglu
from hybridtrain.settings.tree import Settings


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w_gate = nn.Linear(dim, hidden, bias=False)
        self.w_up = nn.Linear(dim, hidden, bias=False)
        self.w_down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w_down(swiglu(self.w_gate(x), self.w_up(x)))
        return out


def make_dense(settings: Settings) -> SwiGLU:
    """The dense feed-forward of a layer."""
    return SwiGLU(settings.model.dim, settings.model.dense.hidden)
