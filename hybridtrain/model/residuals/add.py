"""How a layer reads what came before it and adds to it.

A scheme has a *carry*, rewritten by every layer, and *sources*, named tensors that are written once and read
by later layers; a pipeline moves both between stages. A scheme is a module, since most have parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from hybridtrain.model.component import Carried, Residual
from hybridtrain.section import Section


class Stream(NamedTuple):
    """What flows from layer to layer; a tuple, so that hooks of parallel wrappers see the tensors in it."""

    carry: Tensor
    sources: dict[str, Tensor]


class AddSettings(Section):
    """Nothing to set."""


class AddResidual(nn.Module):
    """h <- h + f(h): the carry is h [B, T, D], and there are no sources."""

    def forward(self, stream: Stream, number: int, sublayer: Callable[[Tensor], Tensor]) -> Stream:
        return Stream(stream.carry + sublayer(stream.carry), stream.sources)


ADD = Residual(
    name="add",
    section=AddSettings,
    build=lambda *_: AddResidual(),
    parameters=lambda _: {},
    start=lambda h_BTD: Stream(h_BTD, {}),
    finish=lambda _, stream: stream.carry,
    carried=lambda _, frame, before: (Carried("h", frame.dim),),
    formats=("hf", "megatron"),
)
