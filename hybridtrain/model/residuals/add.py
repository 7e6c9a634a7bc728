"""How a layer reads what came before it and adds to it.

A scheme has a *carry*, of fixed width and rewritten by every sublayer, and *sources*, named tensors that are
written once and read by later layers; a pipeline moves both between stages. A scheme is a module, since most
have parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn


class Stream(NamedTuple):
    """What flows from layer to layer; a tuple, so that hooks of parallel wrappers see the tensors in it."""

    carry: Tensor
    sources: dict[str, Tensor]


class AddResidual(nn.Module):
    """h <- h + f(h): the carry is h [B, T, D], and there are no sources."""

    @staticmethod
    def start(h_BTD: Tensor) -> Stream:
        """The stream before the first layer, from the embedded tokens."""
        return Stream(h_BTD, {})

    def forward(self, stream: Stream, sublayer: Callable[[Tensor], Tensor]) -> Stream:
        return Stream(stream.carry + sublayer(stream.carry), stream.sources)

    @staticmethod
    def finish(stream: Stream) -> Tensor:
        """The hidden state [B, T, D] behind the last layer."""
        return stream.carry


RESIDUALS: dict[str, type[AddResidual]] = {"add": AddResidual}
