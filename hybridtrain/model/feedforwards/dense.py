"""The dense SwiGLU (arXiv 2002.05202): w_down(silu(w_gate x) * w_up x)."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor, nn

from hybridtrain.kernels.choose import TORCH, Backends
from hybridtrain.kernels.swiglu.op import swiglu
from hybridtrain.model.component import Cut, FeedForward, Frame, Parameter
from hybridtrain.model.exchanges import Exchanges
from hybridtrain.section import Positive, Section


class DenseSettings(Section):
    hidden: Positive = Field(512, description="width of the dense SwiGLU")


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int, backends: Backends = TORCH) -> None:
        super().__init__()
        self.backends = backends
        self.w_gate = nn.Linear(dim, hidden, bias=False)
        self.w_up = nn.Linear(dim, hidden, bias=False)
        self.w_down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w_down(swiglu(self.w_gate(x), self.w_up(x), self.backends))
        return out


SWIGLU: Mapping[str, Parameter] = {
    "w_gate.weight": Parameter(Cut.COLUMN),
    "w_up.weight": Parameter(Cut.COLUMN),
    "w_down.weight": Parameter(Cut.ROW, "residual"),
}
"""The parameters of a `SwiGLU`."""


def _build(section: DenseSettings, frame: Frame, _: Exchanges) -> SwiGLU:
    return SwiGLU(frame.dim, section.hidden, frame.backends)


DENSE = FeedForward(
    name="dense",
    section=DenseSettings,
    build=_build,
    parameters=lambda _: SWIGLU,
    gathers=("",),
    divides=lambda section: {"model.dense.hidden": section.hidden},
    ops=("swiglu",),
    formats=("hf", "megatron"),
)
