"""Components without a fault, and components with one that shows on several ranks or after a restart.

The module can be named in `model.components`. Legend: B sequences, T tokens, D model width, W = 2 D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from hybridtrain.kernels.engram.op import ConvRule
from hybridtrain.model.common import CountingModule, SequenceContext, local
from hybridtrain.model.component import (
    Carried,
    Component,
    Cut,
    FeedForward,
    Frame,
    Mixer,
    Parameter,
    Residual,
    Sees,
)
from hybridtrain.model.exchanges import Exchanges, local_dispatch, position_in_expert
from hybridtrain.model.feedforwards.moe import MOE, MoE, MoESettings
from hybridtrain.model.residuals.add import AddResidual, Stream
from hybridtrain.model.scan import affine_scan
from hybridtrain.section import Section


class FakeSettings(Section):
    """There is nothing to set."""


class Fake(CountingModule):
    """A token's hidden state through a matrix and back; faults are planted in subclasses."""

    def __init__(self, _: FakeSettings, frame: Frame, exchanges: Exchanges) -> None:
        super().__init__()
        self.attend = exchanges.attend
        self.wi = nn.Linear(frame.dim, 2 * frame.dim, bias=False)
        self.wo = nn.Linear(2 * frame.dim, frame.dim, bias=False)

    def forward(self, x_BTD: Tensor, context: SequenceContext) -> Tensor:
        out: Tensor = self.wo(torch.tanh(self.wi(self.before(x_BTD))))
        if self.training:
            self.counters.add("tokens", torch.full((), float(x_BTD[..., 0].numel())))
        return out

    def before(self, x_BTD: Tensor) -> Tensor:
        return x_BTD


GOOD = Mixer(
    name="fake",
    section=FakeSettings,
    build=Fake,
    parameters=lambda _: {"wi.weight": Parameter(Cut.COLUMN), "wo.weight": Parameter(Cut.ROW, "residual")},
    gathers=("wi",),  # the tokens that it counts are this rank's
    sums=lambda _: {"tokens": ()},
)


class Running(CountingModule):
    """A scan of scaled channels behind a short convolution: every cut of a dense parameter, two exchanges."""

    def __init__(self, _: FakeSettings, frame: Frame, exchanges: Exchanges) -> None:
        super().__init__()
        self.scan, self.convolve = exchanges.scan, exchanges.convolve
        self.rule = ConvRule(1, frame.norm_eps)
        self.taps = nn.Parameter(torch.empty(3, frame.dim))
        self.norm = nn.Parameter(torch.empty(frame.dim))
        self.wi = nn.Linear(frame.dim, 2 * frame.dim, bias=False)
        self.scale = nn.Parameter(torch.empty(2 * frame.dim))
        self.wo = nn.Linear(2 * frame.dim, frame.dim, bias=False)

    def forward(self, x_BTD: Tensor, context: SequenceContext) -> Tensor:
        x_BTD = self.neighbours(x_BTD, context)
        input_BTW = self.scaled(torch.tanh(self.wi(x_BTD)))
        out_BTD: Tensor = self.wo(self.state(torch.full_like(input_BTW, 0.9), input_BTW, context))
        return out_BTD

    def neighbours(self, x_BTD: Tensor, context: SequenceContext) -> Tensor:
        return self.convolve(x_BTD, self.norm, self.taps, context.documents_BT, self.rule)

    def scaled(self, x_BTW: Tensor) -> Tensor:
        return x_BTW * local(self.scale)

    def state(self, factor_BTW: Tensor, input_BTW: Tensor, context: SequenceContext) -> Tensor:
        return self.scan(factor_BTW, input_BTW, context)


RUNNING_PARAMETERS = {
    "taps": Parameter(Cut.WHOLE, group="no_decay"),
    "norm": Parameter(Cut.WHOLE, "ones", "no_decay"),
    "wi.weight": Parameter(Cut.COLUMN),
    "scale": Parameter(Cut.VECTOR, "ones", "no_decay"),
    "wo.weight": Parameter(Cut.ROW, "residual"),
}
RUNNING = Mixer(
    name="fake_running",
    section=FakeSettings,
    build=Running,
    parameters=lambda _: RUNNING_PARAMETERS,
    sees=Sees.STATE,
    reach=lambda _: 2,
)


def running(name: str, **changed: Any) -> Mixer:
    """RUNNING with a fault. `changed` are fields, or under `cuts` parameters declared otherwise."""
    cuts: Mapping[str, Parameter] = changed.pop("cuts", {})
    table = {**RUNNING_PARAMETERS, **cuts}
    return replace(RUNNING, name=name, parameters=lambda _: table, **changed)


class ScansFromZero(Running):
    """Scans the tokens that this rank has, as if none were before them."""

    def state(self, factor_BTW: Tensor, input_BTW: Tensor, context: SequenceContext) -> Tensor:
        return affine_scan(factor_BTW, input_BTW)[1]


class TakesNoHalo(Running):
    """Adds to a token the one before it that this rank has."""

    def neighbours(self, x_BTD: Tensor, context: SequenceContext) -> Tensor:
        first = self.taps.sum() * self.norm.sum() * 0  # both have a gradient still
        return x_BTD + torch.cat([x_BTD[:, :1] * 0, x_BTD[:, :-1]], dim=1) + first


class DoesNotTakeItsPart(Running):
    """Multiplies the channels of this rank with the whole vector."""

    def scaled(self, x_BTW: Tensor) -> Tensor:
        return x_BTW * self.scale


class DrawsItsOwn(Running):
    """Draws a parameter itself, of which it has a part."""

    def reset_buffers(self) -> None:
        part = local(self.scale)
        part.data.normal_(generator=torch.Generator().manual_seed(0))


class NormsItsChannels(Running):
    """Divides the channels of this rank by their own length."""

    def scaled(self, x_BTW: Tensor) -> Tensor:
        return super().scaled(x_BTW / (x_BTW.norm(dim=-1, keepdim=True) + 1))


NORMS_CHANNELS = running("fake_norms_channels", build=NormsItsChannels)
FROM_ZERO = running("fake_from_zero", build=ScansFromZero)
NO_HALO = running("fake_no_halo", build=TakesNoHalo)
NOT_LOCAL = running("fake_not_local", build=DoesNotTakeItsPart)
DRAWS = running("fake_draws", build=DrawsItsOwn)
ROW_AS_WHOLE = running("fake_row_as_whole", cuts={"wo.weight": Parameter(Cut.WHOLE, "residual")})
COLUMN_AS_WHOLE = running("fake_column_as_whole", cuts={"wi.weight": Parameter(Cut.WHOLE)})
VECTOR_AS_WHOLE = running("fake_vector_as_whole", cuts={"scale": Parameter(Cut.WHOLE, "ones", "no_decay")})


class LooksBack(Fake):
    """Adds up all earlier tokens that this rank has, which its declaration does not say."""

    def before(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.cumsum(1)


LOOKS_BACK = replace(GOOD, name="fake_looks_back", build=LooksBack, gathers=("",))
NAMELESS = replace(GOOD, name="fake_nameless", formats=("hf", "megatron"))
COUNTS_TWICE = replace(GOOD, name="fake_counts_twice", gathers=("",))


class Forgets(Fake):
    """Learns a number from each step that no checkpoint has."""

    level = 1.0

    def learn(self, sums: Mapping[str, Tensor]) -> None:
        self.level += 0.5

    def before(self, x_BTD: Tensor) -> Tensor:
        return x_BTD * self.level


FORGETS = replace(GOOD, name="fake_forgets", build=Forgets)


class OtherCompiled(Fake):
    """Computes something else where it is compiled."""

    def before(self, x_BTD: Tensor) -> Tensor:
        return x_BTD * 1.01 if torch.compiler.is_compiling() else x_BTD


OTHER_COMPILED = replace(GOOD, name="fake_other_compiled", build=OtherCompiled)


def swapped(exchanges: Exchanges, **others: Any) -> Exchanges:
    """The exchanges, all of which are taken, with others in the place of some."""
    return Exchanges(**{**{f.name: getattr(exchanges, f.name) for f in fields(Exchanges)}, **others})


class RoutesShards(MoE):
    """Numbers the tokens of an expert among those that this rank has."""

    def __init__(self, section: MoESettings, frame: Frame, exchanges: Exchanges) -> None:
        super().__init__(section, frame, swapped(exchanges, position_in_expert=position_in_expert))


class KeepsTokensHere(MoE):
    """Asks this rank's experts only."""

    def __init__(self, section: MoESettings, frame: Frame, exchanges: Exchanges) -> None:
        super().__init__(section, frame, swapped(exchanges, dispatch=_wrapped_around))


def _wrapped_around(num_experts: int, drops: bool, path: str) -> Any:
    inner = local_dispatch(num_experts, drops, path)

    def dispatch(x_ND: Tensor, experts_NK: Tensor, gates_NK: Tensor, experts: Any) -> Callable[[], Tensor]:
        return inner(x_ND, experts_NK % len(local(experts.w_gate)), gates_NK, experts)

    return dispatch


class DividesByItsOwn(MoE):
    """Divides its balance loss by the tokens of this rank, not of the step."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        self.router.tokens_per_step = x_BTD[..., 0].numel()
        out: Tensor = super().forward(x_BTD)
        return out


def moe(name: str, build: type[MoE]) -> FeedForward:
    return replace(MOE, name=name, build=build, formats=())


ROUTES_SHARDS = moe("fake_routes_shards", RoutesShards)
KEEPS_TOKENS = moe("fake_keeps_tokens", KeepsTokensHere)
OWN_TOKENS = moe("fake_own_tokens", DividesByItsOwn)


class KeepsAside(AddResidual):
    """Adds the embedded tokens in every layer, and has them beside the stream."""

    embedded: Tensor | None = None  # of the process

    def forward(self, stream: Stream, number: int, sublayer: Callable[[Tensor], Tensor]) -> Stream:
        first = KeepsAside.embedded if KeepsAside.embedded is not None else stream.carry
        return Stream(stream.carry + 0.5 * first + sublayer(stream.carry), stream.sources)


def _start_aside(h_BTD: Tensor) -> Stream:
    KeepsAside.embedded = h_BTD
    return Stream(h_BTD, {})


KEPT_ASIDE = Residual(
    name="fake_kept_aside",
    section=FakeSettings,
    build=lambda *_: KeepsAside(),
    parameters=lambda _: {},
    start=_start_aside,
    finish=lambda _, stream: stream.carry,
    carried=lambda _, frame, before: (Carried("h", frame.dim),),
)


class FirstAsSource(nn.Module):
    """Adds the embedded tokens in every layer, from a source."""

    def forward(self, stream: Stream, number: int, sublayer: Callable[[Tensor], Tensor]) -> Stream:
        (first,) = stream.sources.values() or (stream.carry,)
        return Stream(stream.carry + 0.5 * first + sublayer(stream.carry), stream.sources)


CARRIED_SOURCE = replace(
    KEPT_ASIDE,
    name="fake_source",
    build=lambda *_: FirstAsSource(),
    start=lambda h_BTD: Stream(h_BTD, {"first": h_BTD}),
    carried=lambda _, frame, before: (Carried("h", frame.dim), Carried("first", frame.dim)),
)

SOUND: tuple[Component, ...] = (GOOD, RUNNING, CARRIED_SOURCE)
"""Those without a fault."""
