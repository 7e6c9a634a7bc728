"""Every built-in component and every example keeps the contract, and a fake with one fault fails it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybridtrain.model.component import ComponentError, Cut, Frame, Mixer, Parameter, Sees
from hybridtrain.model.engram import ENGRAM
from hybridtrain.model.exchanges import Exchanges
from hybridtrain.model.registry import BUILT_IN
from tests.components import contract, fakes
from tests.components.cases import CASES, SOUND
from tests.components.contract import CHECKS, DIM, Case, check_compiled
from tests.components.fakes import GOOD, Fake, FakeSettings


def test_every_registered_component_is_put_to_the_contract() -> None:
    assert {c.name for c in (*BUILT_IN.all, ENGRAM)} <= CASES.keys()
    assert {"gated_recurrence", "scaled_residual"} <= CASES.keys()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", CASES)
def test_components_keep_the_contract(name: str, check: Callable[[Case], None]) -> None:
    check(CASES[name])


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
    "other results where it is compiled": (fakes.OTHER_COMPILED, contract.check_compiled),
}


@pytest.mark.parity  # inductor compiles C++ for each
@pytest.mark.parametrize("name", CASES)
def test_components_compiled_by_inductor_compute_the_same(name: str) -> None:
    check_compiled(CASES[name], "inductor")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", SOUND)
def test_fakes_without_a_fault_keep_the_contract(name: str, check: Callable[[Case], None]) -> None:
    check(SOUND[name])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str) -> None:
    component, check = FAULTS[fault]
    with pytest.raises((AssertionError, ComponentError)):
        check(Case(component, FakeSettings()))
