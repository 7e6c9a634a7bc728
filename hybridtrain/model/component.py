"""The seam: what a mixer, a feed-forward, a residual scheme or an Engram layer says of itself, once.

A declaration stands beside its module as a frozen value. It knows settings and `torch.nn`, and nothing of
ranks. Everything else reads it: settings mount its section, counts and FLOPs build it on the meta device,
initial values and optimizer groups follow its parameters, layouts are checked against what it divides,
`parallel/` cuts its parameters over tp and ep, formats ask it for names.

Shape legend: B sequences, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from torch import Tensor, nn

from hybridtrain.model.exchanges import Exchanges
from hybridtrain.settings.section import Section


class Cut(StrEnum):
    """How a parameter is cut over `tp` (and an expert's over `ep` and `etp`)."""

    COLUMN = "column"  # of an nn.Linear [out, in]: own outputs of whole inputs
    ROW = "row"  # of an nn.Linear [out, in]: own inputs; the outputs are summed over the ranks
    VECTOR = "vector"  # dim 0 is cut as the outputs of a column product are
    WHOLE = "whole"  # every rank has all of it
    EXPERT_COLUMN = "expert column"  # [experts, in, out]: own experts, under etp own outputs
    EXPERT_ROW = "expert row"  # [experts, in, out]: own experts, under etp own inputs


class Sees(StrEnum):
    """How much of a sequence a component looks at, and so what it needs of other ranks under `cp`."""

    TOKEN = "token"  # each token by itself: nothing
    KEYS = "keys"  # keys and values of all earlier tokens: `Exchanges.attend`
    STATE = "state"  # a state that the tokens before pass on: `Exchanges.scan`
    NEIGHBOURS = "neighbours"  # a bounded number of earlier tokens: `Exchanges.convolve`
    SEQUENCE = "sequence"  # in a way of its own, which no exchange serves: cp is refused


@dataclass(frozen=True)
class Parameter:
    """What there is to know of one parameter, beside its shape, which its module has.

    `init`: "normal" with `model.init_std`, "residual" the same over sqrt(2 layers) for what writes to the
    residual stream, "ones", "zeros", or a number that all elements are.
    `group`: "matrix" is decayed and may go to Muon, "adamw" is decayed and stays with AdamW, "no_decay".
    """

    cut: Cut
    init: Literal["normal", "residual", "ones", "zeros"] | float = "normal"
    group: Literal["matrix", "adamw", "no_decay"] = "matrix"


NORM = Parameter(Cut.WHOLE, "ones", "no_decay")
"""The weight of an RMS norm over the model's width or a head's."""


@dataclass(frozen=True)
class Frame:
    """What every component of a model is built for, whatever its own section says."""

    dim: int
    norm_eps: float
    seq_len: int
    tokens_per_step: int  # of all ranks
    path: str = ""  # where the module stands in the model, for messages


def _nothing(*_: Any) -> dict[str, Any]:
    return {}


def _zero(*_: Any) -> float:
    return 0.0


@dataclass(frozen=True, kw_only=True)
class Component:
    """What all four kinds declare. Functions of a section are called with an instance of `section`.

    name: the word in `model.layers` (of a residual scheme: in `model.residual`)
    section: its settings, mounted as [model.NAME]; it validates itself
    build: the module, from section, frame and exchanges
    parameters: every parameter of the module by its name; one unnamed or not there is an error with its path
    sees: what it looks at of a sequence
    gathers: paths of submodules ("" is the module) that read whole sequences where tp cuts them
    divides: numbers by their keys that tp must divide
    reach: tokens left of its own that it looks at, where it sees neighbours
    flops: forward operations of a token beyond the products with its parameters, a multiply-add being two
    shares: parameters by name of which one token reads a share only (experts): the share
    sums: shapes of the running sums that it takes while it trains (model/statistics.py)
    ops: kernels that it may call (keys of [kernels]); shown in the header of a run
    names: its parameters' names in other formats: format → name here → name there; a format that is
        absent refuses the component by name
    """

    name: str
    section: type[Section]
    build: Callable[[Any, Frame, Exchanges], nn.Module]
    parameters: Callable[[Any], Mapping[str, Parameter]]
    sees: Sees = Sees.TOKEN
    gathers: tuple[str, ...] = ()
    divides: Callable[[Any], Mapping[str, int]] = _nothing
    reach: Callable[[Any], int] = field(default=lambda _: 0)
    flops: Callable[[Any, Frame], float] = _zero
    shares: Callable[[Any], Mapping[str, float]] = _nothing
    sums: Callable[[Any], Mapping[str, tuple[int, ...]]] = _nothing
    ops: tuple[str, ...] = ()
    names: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Mixer(Component):
    """Called as `module(x_BTD, context)`: [B, T, D]. Documents of a sequence do not see each other."""

    gathers: tuple[str, ...] = ("",)


@dataclass(frozen=True, kw_only=True)
class FeedForward(Component):
    """Called as `module(x_BTD)`: [B, T, D]."""


@dataclass(frozen=True, kw_only=True)
class Engram(Component):
    """Called as `module(h_BTD, rows_BTSC, documents_BT)`: what it adds [B, T, D]; rows of whole sequences."""


@dataclass(frozen=True)
class Carried:
    """A tensor [B, T, width] that crosses from one layer to a later one."""

    name: str
    width: int


@dataclass(frozen=True, kw_only=True)
class Residual(Component):
    """A residual scheme: how a sublayer reads what came before it and what becomes of its output.

    Its module, one in each layer, is called as `module(stream, number, sublayer)` with the sublayer's number
    in the layer (from 0) and gives the stream behind it, in which sources may be new. `build` gets the
    layer's place by `frame.path` ("layers.3.residual"), and one more is built for the place behind the last.
    start: the stream from the embedded tokens
    finish: the hidden state behind the last layer, from the module of that place and the stream
    carried: what layer `before` and later ones read of earlier ones, from section, frame and `before` (the
        number of layers for what `finish` reads): the carry first, then sources, which are written once and
        never change. A layer gets these sources in this order. A carry may stay behind as a source, under
        its name.
    """

    start: Callable[[Tensor], Any]
    finish: Callable[[nn.Module, Any], Tensor]
    carried: Callable[[Any, Frame, int], tuple[Carried, ...]]
