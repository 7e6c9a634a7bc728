"""Every legal layout gives the numbers of one rank: losses of 5 steps, parameters, moments, rows and row
state.

The bound is a multiple of what the one-rank run differs from itself by when its sums are taken in other
orders (orders.py). `make test` runs a few layouts that cover all pairs of axes and all schedules, `make
test-parity` all of 2 and 4 ranks and a sample of 8.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from hybridtrain.parallel.stages import SCHEDULES
from tests.parity.cases import AXES, DENSE, SAMPLE, Case, covering, layouts, matrix
from tests.parity.faults import FAULTS
from tests.parity.matrix import BOUND, Outcome, References, assert_meaningful, make_references, run_matrix
from tests.training import make_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("parity") / "data")


@pytest.fixture(scope="module")
def references(data: Path) -> References:
    """Of the cases that `make test` runs."""
    return make_references(data, covering())


@pytest.fixture(scope="module")
def fast(data: Path, references: References, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Outcome]:
    outcomes = run_matrix(data, covering(), references, tmp_path_factory.mktemp("fast"))
    return {outcome.case: outcome for outcome in outcomes}


@pytest.fixture(scope="module")
def slow(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Outcome]:
    references = make_references(data, matrix())
    assert_meaningful(references)
    outcomes = run_matrix(data, matrix(), references, tmp_path_factory.mktemp("slow"), timeout=600)
    return {outcome.case: outcome for outcome in outcomes}


@pytest.mark.parametrize("case", covering(), ids=str)
def test_every_pair_of_axes_gives_the_numbers_of_one_rank(fast: dict[Case, Outcome], case: Case) -> None:
    assert not fast[case].beyond


@pytest.mark.parity
@pytest.mark.timeout(3300)
@pytest.mark.parametrize("case", matrix(), ids=str)
def test_every_layout_gives_the_numbers_of_one_rank(slow: dict[Case, Outcome], case: Case) -> None:
    assert not slow[case].beyond


def test_the_bound_says_something(references: References) -> None:
    assert_meaningful(references)


def test_mistakes_are_beyond_the_bound(data: Path, references: References, tmp_path: Path) -> None:
    """At the layout that has most to get wrong, each mistake alone."""
    case = next(case for case in layouts(2) if case["tp"] == 2 and case["mem"] == 1)
    clean, *broken = run_matrix(data, [case] * (1 + len(FAULTS)), references, tmp_path, ["", *FAULTS])
    assert not clean.beyond
    for fault, outcome in zip(FAULTS, broken, strict=True):
        assert max(outcome.multiples.values()) > 100 * BOUND, fault
    assert broken[list(FAULTS).index("row gradients doubled")].worst("row state") > 100 * BOUND


def test_the_matrix_has_every_layout_and_every_schedule() -> None:
    for world in (2, 4):
        mine = {case.degrees for case in matrix() if case.world == world and not case.variant}
        assert mine == {case.degrees for case in layouts(world)}
    assert len({case.degrees for case in matrix() if case.world == 8}) == SAMPLE < len(layouts(8))
    assert len(matrix()) == len(set(matrix()))
    for pp in (2, 4):
        assert {case.schedule for case in matrix() if case["pp"] == pp and case.world == 4} == set(SCHEDULES)
    for axis, degree in itertools.product(AXES, (2, 4)):
        assert any(case[axis] == degree for case in layouts(4)), (axis, degree)


def test_the_few_layouts_cover_all_pairs_of_axes() -> None:
    pairs = {
        pair for case in covering() for pair in itertools.combinations([a for a in AXES if case[a] > 1], 2)
    }
    assert pairs >= set(itertools.combinations(DENSE, 2))
    assert pairs >= {(axis, "mem") for axis in AXES[:-1]}
    assert pairs >= {(axis, "ep") for axis in ("dp_replicate", "pp", "dp_shard", "cp", "tp")}
    assert {case.schedule for case in covering()} >= set(SCHEDULES)
    assert len(covering()) < 15
