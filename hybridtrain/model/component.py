"""What a mixer, a feed-forward, a residual scheme or an Engram layer declares about itself, in one place.

A declaration stands beside its module as a frozen value. It knows settings and `torch.nn`, and nothing of
ranks. Everything else reads it: settings mount its section, counts and FLOPs build it on the meta device,
initial values and optimizer groups follow its parameters, layouts are checked against what it divides,
`parallel/` cuts its parameters over tp and ep, formats ask it for names.

Shape legend: B sequences, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Literal

from torch import Tensor, nn

from hybridtrain.errors import UserError
from hybridtrain.kernels.choose import TORCH, Backends
from hybridtrain.model.exchanges import LOCAL, Exchanges
from hybridtrain.section import Section


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
    """The declaration of one parameter; its shape comes from its module.

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
    backends: Backends = TORCH  # what carries its operations


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
    sums: shapes of the running sums that it takes while it trains (`CountingModule` in model/common.py); they
        are added up over all ranks, so tokens that are counted where tp gathers count tp times
    ops: kernels that it may call (keys of [kernels]); shown in the header of a run
    formats: other formats whose tables in formats/ have its parameters; another one, and every format for a
        component that is not of this package, is refused by name
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
    formats: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Mixer(Component):
    """Called as `module(x_BTD, context)`: [B, T, D]. Documents of a sequence do not see each other."""

    gathers: tuple[str, ...] = ("",)


@dataclass(frozen=True, kw_only=True)
class FeedForward(Component):
    """Called as `module(x_BTD)`: [B, T, D]."""


@dataclass(frozen=True, kw_only=True)
class Engram(Component):
    """Called as `module(h_BTD, rows_BTSC, documents_BT)`: what it adds, [B, T, D]. Rows are of whole
    sequences."""


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
    layer's place by `frame.path` ("layers.3.residual").
    start: the stream from the embedded tokens
    end: whether there is a module behind the last layer too, of the place that is their number
    finish: the hidden state behind the last layer, from that module (None without one) and the stream
    carried: what layer `before` and later ones read of earlier ones, from section, frame and `before` (the
        number of layers for what `finish` reads): the carry first, then sources, which are written once and
        never change. A layer gets these sources in this order. A carry may stay behind as a source, under
        its name.
    """

    start: Callable[[Tensor], Any]
    finish: Callable[[nn.Module | None, Any], Tensor]
    carried: Callable[[Any, Frame, int], tuple[Carried, ...]]
    end: bool = False


class ComponentError(UserError):
    """A module differs from its component's declaration; the message has the path."""


@dataclass(frozen=True)
class Placed:
    """A component's module as it stands in a model."""

    path: str
    module: nn.Module
    component: Component
    section: Any

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """What the component declares of the module's parameters."""
        return self.component.parameters(self.section)


Compute = Callable[..., Any]


def _as_it_is(compute: Compute) -> Compute:
    return compute


@dataclass(frozen=True)
class Wiring:
    """What a model is handed when it is built; the defaults are for a model on one device.

    whole: for components that are given whole sequences ("" in `gathers`)
    shards: for those that are given this rank's part of each sequence under tp, and for the head
    positions_T: which tokens of a sequence this rank has, int64; None: all
    wrap_layer: from what a layer computes to what runs it (recomputed, compiled); hooks stay outside
    backends: what carries the operations of its modules
    """

    whole: Exchanges = LOCAL
    shards: Exchanges = LOCAL
    positions_T: Tensor | None = None
    wrap_layer: Callable[[Compute], Compute] = _as_it_is
    backends: Backends = TORCH

    def build(self, component: Component, section: Any, frame: Frame) -> Placed:
        """The component's module. Raises ComponentError where it was not built with an exchange that it
        needs: on several ranks it would compute something else."""
        taken = _Noted(self.whole if "" in component.gathers else self.shards)
        placed = Placed(frame.path, component.build(section, frame, taken), component, section)
        for name, why in _needed(component, section).items():
            if name not in taken.names:
                raise ComponentError(
                    f"{frame.path}: {component.name} {why}, but was built without `exchanges.{name}`; take "
                    "it when the module is built, or its tokens do not meet those of other ranks"
                )
        return placed


LOCAL_WIRING = Wiring()
"""All of a model on one device."""


class _Noted(Exchanges):
    """Exchanges that remember which of them were taken."""

    names: set[str]

    def __init__(self, exchanges: Exchanges) -> None:
        super().__init__(**{f.name: getattr(exchanges, f.name) for f in fields(exchanges)})
        object.__setattr__(self, "names", set())

    def __getattribute__(self, name: str) -> Any:
        if name in Exchanges.__dataclass_fields__:
            object.__getattribute__(self, "names").add(name)
        return object.__getattribute__(self, name)


def _needed(component: Component, section: Any) -> dict[str, str]:
    """The exchanges that a component cannot do without, and why."""
    of = {Sees.KEYS: "attend", Sees.STATE: "scan"}
    needed = {of[s]: f"sees {s}" for s in of if s == component.sees}
    if (reach := component.reach(section)) > 0:
        needed["convolve"] = f"looks {reach} tokens back"
    experts = (Cut.EXPERT_COLUMN, Cut.EXPERT_ROW)
    if any(p.cut in experts for p in component.parameters(section).values()):
        needed["dispatch"] = "has experts"
    return needed
