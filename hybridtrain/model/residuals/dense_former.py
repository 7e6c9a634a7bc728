"""DenseFormer (Pagliardini et al. 2024, arXiv 2402.02622): a layer reads a learned sum of all before it.

X_0 is the embedding and X_j the output of layer j (counted from 1, which adds inside as "add" does). Layer
i+1 reads Y_i, and the final norm Y_L:

    Y_i = X_i + sum over j <= i of alpha_ij X_j

The paper's depth weights are alpha_ij, plus 1 where i = j: parameters hold the difference from a plain
transformer, which is where training starts, and which low precision rounds least. L layers have
(L + 1)(L + 2)/2 of them; the paper has one less, since it leaves Y_0 = X_0.

The carry before a layer is the X of the layer before it, under the name that it keeps as a source ("x3" is
X_3), so what crosses a stage behind l layers are l + 1 tensors at most.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hybridtrain.model.component import Carried, Cut, Frame, Parameter, Residual
from hybridtrain.model.residuals.add import Stream
from hybridtrain.section import Section


class DenseFormerSettings(Section):
    """There is nothing to set."""


class DenseFormerResidual(nn.Module):
    """Of one layer, or of the norm behind the last: `place` is the number of layers before it."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(place + 1))

    def forward(self, stream: Stream, number: int, sublayer: Callable[[Tensor], Tensor]) -> Stream:
        h_BTD = self.mix(stream) if number == 0 else stream.carry
        return Stream(h_BTD + sublayer(h_BTD), stream.sources)

    def mix(self, stream: Stream) -> Tensor:
        """Y [B, T, D] of X_0, X_1, … (the sources, in this order) and the newest X, the carry."""
        y_BTD = stream.carry
        xs = (*stream.sources.values(), stream.carry)
        for weight, x_BTD in zip(self.alpha.unbind(), xs, strict=True):
            y_BTD = torch.addcmul(y_BTD, x_BTD, weight)
        return y_BTD


def _place(frame: Frame) -> int:
    """The number of layers before the module: its path is "layers.PLACE.residual"."""
    return int(frame.path.split(".")[1])


def _finish(module: nn.Module | None, stream: Stream) -> Tensor:
    assert isinstance(module, DenseFormerResidual)
    return module.mix(stream)


DENSE_FORMER = Residual(
    name="dense_former",
    section=DenseFormerSettings,
    build=lambda section, frame, exchanges: DenseFormerResidual(_place(frame)),
    parameters=lambda _: {"alpha": Parameter(Cut.WHOLE, "zeros", "no_decay")},
    start=lambda x_BTD: Stream(x_BTD, {}),
    finish=_finish,
    end=True,
    carried=lambda _, frame, before: tuple(Carried(f"x{j}", frame.dim) for j in (before, *range(before))),
)
