"""A residual scheme from outside of the package: what a sublayer adds is scaled for each channel by a learned
vector that begins small (LayerScale, arXiv 2103.17239, §3; of one number it is ReZero, arXiv 2003.04887).

    h <- h + s_i * f_i(h)        with s_i of each sublayer i of a layer

Shape legend: B sequences, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn

from hybridtrain.model.component import Carried, Cut, Frame, Parameter, Residual
from hybridtrain.model.exchanges import Exchanges
from hybridtrain.model.residuals.add import Stream
from hybridtrain.section import Section

SUBLAYERS = 3  # of a layer, at most: Engram, mixer, feed-forward


class ScaledResidualSettings(Section):
    start: float = Field(0.1, description="every scale before the first step")


class ScaledResidual(nn.Module):
    def __init__(self, section: ScaledResidualSettings, frame: Frame, _: Exchanges) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(SUBLAYERS, frame.dim))

    def forward(self, stream: Stream, number: int, sublayer: Callable[[Tensor], Tensor]) -> Stream:
        added_BTD = sublayer(stream.carry)
        # of a layer without Engram the first vector is its mixer's, and the last one rests
        return Stream(stream.carry + self.scale[number].to(added_BTD.dtype) * added_BTD, stream.sources)


SCALED_RESIDUAL = Residual(
    name="scaled_residual",
    section=ScaledResidualSettings,
    build=ScaledResidual,
    parameters=lambda section: {"scale": Parameter(Cut.WHOLE, section.start, "no_decay")},
    start=lambda h_BTD: Stream(h_BTD, {}),
    finish=lambda _, stream: stream.carry,
    carried=lambda _, frame, before: (Carried("carry", frame.dim),),
)
