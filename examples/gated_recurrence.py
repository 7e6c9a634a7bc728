"""A mixer from outside of the package: a gated linear recurrence (as in Griffin, arXiv 2402.19427, §2.4).

    h_t = a_t * h_(t-1) + sqrt(1 - a_t^2) * v_t        y_t = W_o (silu(W_g x_t) * h_t)

with a_t = exp(-rate * softplus(d) * sigmoid(W_a x_t)) for each channel by itself. `exchanges.scan` passes the
state over the ranks of `cp`, and every channel is on one rank of `tp`, so nothing here knows of ranks.

Shape legend: B sequences, T tokens, D model width, W channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from hybridtrain.model.common import SequenceContext, local
from hybridtrain.model.component import Cut, Frame, Mixer, Parameter, Sees
from hybridtrain.model.exchanges import Exchanges
from hybridtrain.section import Positive, Section


class GatedRecurrenceSettings(Section):
    width: Positive = Field(128, description="channels of the state; tp divides it")
    rate: float = Field(8.0, gt=0, description="how fast a channel can forget; larger is faster")


class GatedRecurrence(nn.Module):
    def __init__(self, section: GatedRecurrenceSettings, frame: Frame, exchanges: Exchanges) -> None:
        super().__init__()
        self.rate, self.scan = section.rate, exchanges.scan
        self.wa = nn.Linear(frame.dim, section.width, bias=False)
        self.wv = nn.Linear(frame.dim, section.width, bias=False)
        self.wg = nn.Linear(frame.dim, section.width, bias=False)
        self.wo = nn.Linear(section.width, frame.dim, bias=False)
        self.decay = nn.Parameter(torch.empty(section.width))

    def forward(self, x_BTD: Tensor, context: SequenceContext) -> Tensor:
        gate_BTW = torch.sigmoid(self.wa(x_BTD).float())
        log_factor_BTW = -self.rate * F.softplus(local(self.decay).float()) * gate_BTW
        input_BTW = (1 - (2 * log_factor_BTW).exp() + 1e-6).sqrt() * self.wv(x_BTD).float()
        state_BTW = self.scan(log_factor_BTW.exp(), input_BTW, context).to(x_BTD.dtype)
        out_BTD: Tensor = self.wo(F.silu(self.wg(x_BTD)) * state_BTW)
        return out_BTD


def _parameters(_: GatedRecurrenceSettings) -> Mapping[str, Parameter]:
    return {
        "wa.weight": Parameter(Cut.COLUMN),
        "wv.weight": Parameter(Cut.COLUMN),
        "wg.weight": Parameter(Cut.COLUMN),
        "wo.weight": Parameter(Cut.ROW, "residual"),
        "decay": Parameter(Cut.VECTOR, -4.0, "no_decay"),  # a_t of about 0.93 where the gate is half open
    }


GATED_RECURRENCE = Mixer(
    name="gated_recurrence",
    section=GatedRecurrenceSettings,
    build=GatedRecurrence,
    parameters=_parameters,
    sees=Sees.STATE,
    divides=lambda section: {"model.gated_recurrence.width": section.width},
)
