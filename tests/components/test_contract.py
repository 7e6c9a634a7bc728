"""Every built-in component and every example keeps the contract, and a fake with one fault fails it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybridtrain.model.common import CountingModule, SequenceContext
from hybridtrain.model.component import ComponentError, Cut, Frame, Mixer, Parameter, Sees
from hybridtrain.model.engram import ENGRAM
from hybridtrain.model.exchanges import Exchanges
from hybridtrain.model.feedforwards.dense import DENSE, DenseSettings
from hybridtrain.model.feedforwards.moe import MOE, MoESettings
from hybridtrain.model.mixers.attention import ATTENTION, AttentionSettings
from hybridtrain.model.registry import BUILT_IN, Components
from hybridtrain.model.residuals.add import ADD, AddSettings
from hybridtrain.model.residuals.dense_former import DENSE_FORMER, DenseFormerSettings
from hybridtrain.section import Section
from hybridtrain.settings.engram import EngramSettings
from tests.components import contract
from tests.components.contract import CHECKS, DIM, Case

OUTSIDE = Components.load(("examples.gated_recurrence", "examples.scaled_residual"))
MOE_SMALL = MoESettings(num_experts=4, hidden=16, num_shared=1, aux_weight=0.01, z_weight=0.01)
CASES = {
    "attention": Case(ATTENTION, AttentionSettings(num_heads=4, num_kv_heads=2, head_dim=8)),
    "dense": Case(DENSE, DenseSettings(hidden=48)),
    "moe": Case(MOE, MOE_SMALL),
    "engram": Case(ENGRAM, EngramSettings(heads=2, head_dim=8)),
    "add": Case(ADD, AddSettings()),
    "dense_former": Case(DENSE_FORMER, DenseFormerSettings()),
    **{c.name: Case(c, c.section()) for c in OUTSIDE.added},
}


def test_every_registered_component_is_put_to_the_contract() -> None:
    assert {c.name for c in (*BUILT_IN.all, ENGRAM)} <= CASES.keys()
    assert {"gated_recurrence", "scaled_residual"} <= CASES.keys()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", CASES)
def test_components_keep_the_contract(name: str, check: Callable[[Case], None]) -> None:
    check(CASES[name])


class FakeSettings(Section):
    """Nothing to set."""


class Fake(CountingModule):
    """A token's hidden state through a matrix and back; faults are planted in subclasses."""

    def __init__(self, _: FakeSettings, frame: Frame, exchanges: Exchanges) -> None:
        super().__init__()
        self.attend = exchanges.attend
        self.wi = nn.Linear(frame.dim, 2 * DIM, bias=False)
        self.wo = nn.Linear(2 * DIM, frame.dim, bias=False)

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
    sums=lambda _: {"tokens": ()},
)


class ExtraParameter(Fake):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.extra = nn.Parameter(torch.empty(3))


class OtherOnMeta(Fake):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self.wi.weight.device.type == "meta":
            self.wi = nn.Linear(DIM, 3 * DIM, bias=False)


class SeesOtherDocuments(Fake):
    def before(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.cumsum(1)


class SeesTheFuture(Fake):
    def before(self, x_BTD: Tensor) -> Tensor:
        return torch.cat([x_BTD[:, 1:], x_BTD[:, -1:]], dim=1)


class OtherTheSecondTime(Fake):
    calls = 0

    def before(self, x_BTD: Tensor) -> Tensor:
        self.calls += 1
        return x_BTD * self.calls


class CountsMore(Fake):
    def before(self, x_BTD: Tensor) -> Tensor:
        self.counters.add("undeclared", x_BTD.sum())
        return x_BTD


class ComputesMore(Fake):
    def before(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + (x_BTD @ x_BTD.new_zeros(DIM, DIM))


class TakesNoExchange(Fake):
    def __init__(self, section: FakeSettings, frame: Frame, _: Exchanges) -> None:
        super().__init__(section, frame, Exchanges())


def declared(**parameters: Parameter) -> Mixer:
    names = {name.replace("_", "."): parameter for name, parameter in parameters.items()}
    return replace(GOOD, parameters=lambda _: names)


BOTH = {"wi_weight": Parameter(Cut.COLUMN), "wo_weight": Parameter(Cut.ROW)}
FAULTS: dict[str, tuple[Mixer, Callable[[Case], None]]] = {
    "a parameter that is not declared": (replace(GOOD, build=ExtraParameter), contract.check_declaration),
    "a declared parameter that is not there": (
        declared(**BOTH, wx_weight=Parameter(Cut.WHOLE)),
        contract.check_declaration,
    ),
    "other shapes on meta": (replace(GOOD, build=OtherOnMeta), contract.check_declaration),
    "a matrix cut as experts": (
        declared(**{**BOTH, "wi_weight": Parameter(Cut.VECTOR)} | {"wo_weight": Parameter(Cut.EXPERT_ROW)}),
        contract.check_cuts,
    ),
    "a column product outside of gathers": (replace(GOOD, gathers=("inner",)), contract.check_declaration),
    "keys seen without the exchange": (
        replace(GOOD, build=TakesNoExchange, sees=Sees.KEYS),
        contract.check_declaration,
    ),
    "documents that see each other": (replace(GOOD, build=SeesOtherDocuments), contract.check_documents),
    "tokens that see later ones": (replace(GOOD, build=SeesTheFuture), contract.check_causal),
    "other results the second time": (replace(GOOD, build=OtherTheSecondTime), contract.check_recompute),
    "a sum that is not declared": (replace(GOOD, build=CountsMore), contract.check_sums),
    "a declared sum that is not taken": (
        replace(GOOD, sums=lambda _: {"tokens": (), "more": ()}),
        contract.check_sums,
    ),
    "operations that are not declared": (replace(GOOD, build=ComputesMore), contract.check_flops),
    "declared operations that are not done": (
        replace(GOOD, flops=lambda *_: 1e4),
        contract.check_flops,
    ),
    "a matrix that is not among the products": (
        declared(**{**BOTH, "wi_weight": Parameter(Cut.COLUMN, group="no_decay")}),
        contract.check_flops,
    ),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_fake_without_a_fault_keeps_the_contract(check: Callable[[Case], None]) -> None:
    check(Case(GOOD, FakeSettings()))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str) -> None:
    component, check = FAULTS[fault]
    with pytest.raises((AssertionError, ComponentError)):
        check(Case(component, FakeSettings()))
