"""Components compute on two ranks what they do on one, resume bit for bit, and are exported whole or refused
by name; a fake with one fault fails the same check.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hybridtrain.model.component import Component
from hybridtrain.model.feedforwards.moe import MoESettings
from tests.components import fakes, on_ranks
from tests.components.cases import CAPACITY, CASES, SOUND
from tests.components.contract import Case
from tests.components.on_ranks import (
    AXES,
    PAIRS,
    RANK_CHECKS,
    OnRanks,
    Restart,
    check_export,
    check_resume,
    evidence_of,
    restarts_of,
)

SPREAD = {**CASES, **SOUND, **CAPACITY}
RESTARTED = {**CASES, "fake": SOUND["fake"]}
MOE = MoESettings(num_experts=4, hidden=16, capacity=0.5, z_weight=0.5)


def faulty(component: Component) -> Case:
    return Case(component, MOE if component.section is MoESettings else component.section())


Fault = tuple[Component, str, Callable[[OnRanks], None]]
FAULTS: dict[str, Fault] = {
    "a scan of each chunk from zero": (fakes.FROM_ZERO, "cp", on_ranks.check_loss),
    "neighbours of this rank alone": (fakes.NO_HALO, "cp", on_ranks.check_loss),
    "earlier tokens seen undeclared": (fakes.LOOKS_BACK, "cp", on_ranks.check_loss),
    "a router that numbers tokens of chunks": (fakes.ROUTES_SHARDS, "cp", on_ranks.check_loss),
    "a router that numbers tokens of shards": (fakes.ROUTES_SHARDS, "tp", on_ranks.check_loss),
    "a norm of the channels here": (fakes.NORMS_CHANNELS, "tp", on_ranks.check_loss),
    "a vector not taken locally": (fakes.NOT_LOCAL, "tp", on_ranks.check_loss),
    "a row cut declared as whole": (fakes.ROW_AS_WHOLE, "tp", on_ranks.check_loss),
    "a column cut declared as whole": (fakes.COLUMN_AS_WHOLE, "tp", on_ranks.check_loss),
    "a vector declared as whole": (fakes.VECTOR_AS_WHOLE, "tp", on_ranks.check_loss),
    "initial values that depend on the cut": (fakes.DRAWS, "tp", on_ranks.check_initial_values),
    "tokens counted on every rank": (fakes.COUNTS_TWICE, "tp", on_ranks.check_statistics),
    "a source that is not carried": (fakes.KEPT_ASIDE, "pp", on_ranks.check_loss),
    "tokens that do not travel": (fakes.KEEPS_TOKENS, "ep", on_ranks.check_loss),
    "a loss divided by tokens here": (fakes.OWN_TOKENS, "ep", on_ranks.check_gradients),
}


@pytest.fixture(scope="session")
def evidence(data: Path) -> dict[tuple[str, str], OnRanks]:
    """By name and axis, of all components with and without a fault."""
    wanted = {(name, axis): case for name, case in SPREAD.items() for axis in AXES}
    wanted |= {(component.name, axis): faulty(component) for component, axis, _ in FAULTS.values()}
    return evidence_of(wanted, data)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", SPREAD)
def test_components_are_the_same_on_two_ranks(
    evidence: dict[tuple[str, str], OnRanks], name: str, axis: str
) -> None:
    for check in RANK_CHECKS:
        check(evidence[name, axis])


@pytest.mark.parity
@pytest.mark.parametrize("pair", PAIRS)
def test_components_are_the_same_on_four_ranks(data: Path, pair: str) -> None:
    for (name, _), found in evidence_of({(n, pair): c for n, c in SPREAD.items()}, data, 4).items():
        try:
            for check in RANK_CHECKS:
                check(found)
        except AssertionError as error:
            raise AssertionError(name) from error


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_shows_on_two_ranks_is_caught(
    evidence: dict[tuple[str, str], OnRanks], fault: str
) -> None:
    component, axis, check = FAULTS[fault]
    found = evidence[component.name, axis]
    assert not isinstance(found.alone, str), found.alone  # on one rank it is none
    with pytest.raises(AssertionError):
        check(found)
    for earlier in RANK_CHECKS[: RANK_CHECKS.index(check)]:
        if not isinstance(found.ranks[0], str):
            earlier(found)


@pytest.fixture(scope="session")
def restarts(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Restart]:
    every = {**RESTARTED, "forgets": faulty(fakes.FORGETS), "nameless": faulty(fakes.NAMELESS)}
    return restarts_of(every, data, tmp_path_factory.mktemp("restarts"))


@pytest.mark.parametrize("name", RESTARTED)
def test_a_run_goes_on_bit_for_bit(restarts: dict[str, Restart], name: str) -> None:
    check_resume(restarts[name])


def test_what_no_checkpoint_has_is_caught(restarts: dict[str, Restart]) -> None:
    with pytest.raises(AssertionError):
        check_resume(restarts["forgets"])


@pytest.mark.parametrize("to", ["hf", "megatron"])
@pytest.mark.parametrize("name", RESTARTED)
def test_an_export_comes_back_or_is_refused_by_name(
    restarts: dict[str, Restart], name: str, to: str, tmp_path: Path
) -> None:
    check_export(RESTARTED[name], restarts[name].whole, to, tmp_path)


@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_a_format_declared_without_names_is_caught(
    restarts: dict[str, Restart], to: str, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="does not take fake_nameless, which declares it"):
        check_export(faulty(fakes.NAMELESS), restarts["nameless"].whole, to, tmp_path)


def test_a_refusal_without_the_name_is_caught(restarts: dict[str, Restart], tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_export(faulty(fakes.GOOD), restarts["nameless"].whole, "hf", tmp_path)
