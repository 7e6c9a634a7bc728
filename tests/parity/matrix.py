"""Runs cases of the parity matrix, in one start of ranks per world, and says how far each is from one
rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.parity.cases import Case
from tests.parity.orders import ORDERS, Reference, make_reference, run_alone
from tests.parity.runs import run_cases
from tests.ranks import run_on_ranks

KINDS = ("losses", "parameters", "moments", "rows", "row state")
BOUND = 8.0
"""A layout may be so many times as far from the one-rank run as that is from itself with its sums in other
orders.
"""
CEILING = 1e-3
"""What BOUND times the noise must stay below for every single number, or the comparison would say nothing."""

PER_START = 25

References = dict[tuple[str, ...], Reference]


@dataclass(frozen=True)
class Outcome:
    """How far a case was from the one-rank run: distances and the noise, by name."""

    case: Case
    distance: dict[str, float]
    noise: dict[str, float]

    @property
    def multiples(self) -> dict[str, float]:
        """Distances as multiples of the noise; what has no noise must be equal."""
        return {
            name: d / self.noise[name] if self.noise[name] else (0.0 if d == 0 else float("inf"))
            for name, d in self.distance.items()
        }

    def worst(self, kind: str) -> float:
        return max(value for name, value in self.multiples.items() if kind_of(name) == kind)

    @property
    def beyond(self) -> dict[str, float]:
        """The multiples above the bound, largest first."""
        return {n: v for n, v in sorted(self.multiples.items(), key=lambda item: -item[1]) if not v <= BOUND}


def kind_of(name: str) -> str:
    """Which of KINDS a number is."""
    if name == "table.rows":
        return "rows"
    return {"curve": "losses", "model": "parameters", "optim": "moments", "table": "row state"}[
        name.split(".")[0]
    ]


def assert_meaningful(references: References) -> None:
    """The one-rank runs learn, so that equal losses mean equal updates, and no bound is wide."""
    for reference in references.values():
        curve = reference.run.curve["loss"]
        assert curve[-1] < curve[0] - 0.05
        assert max(reference.noise.values()) * BOUND < CEILING
        exact = {name for name, value in reference.noise.items() if value == 0}
        assert exact == {"table.state.last"}  # all else is compared as real numbers


def make_references(data: Path, cases: Sequence[Case]) -> References:
    """The one-rank runs that these cases are compared with, on two ranks that work side by side."""
    keys = list(dict.fromkeys(case.numbers for case in cases))
    runs = [(key, order) for key in keys for order in ORDERS]
    first, second = run_on_ranks(run_alone, 2, str(data), runs, timeout=300)
    done = [run for pair in zip(first, second, strict=True) for run in pair]
    return {key: make_reference(done[i * len(ORDERS) : (i + 1) * len(ORDERS)]) for i, key in enumerate(keys)}


def run_matrix(
    data: Path,
    cases: Sequence[Case],
    references: References,
    folder: Path,
    faults: Sequence[str] = (),
    timeout: float = 280,
) -> list[Outcome]:
    """Every case's outcome, in order; `faults` are mistakes to make in them. `timeout` in seconds is for each
    start of ranks.
    """
    files = {key: str(folder / f"reference-{i}.pt") for i, key in enumerate(references)}
    for key, file in files.items():
        torch.save(references[key].run, file)
    found: dict[int, Outcome] = {}
    worlds = [
        [i for i, case in enumerate(cases) if case.world == world]
        for world in sorted({case.world for case in cases})
    ]
    for start, places in enumerate(part for world in worlds for part in _parts(world)):
        given = [(cases[i], faults[i] if faults else "") for i in places]
        store = str(folder / f"store{start}")
        ranks = run_on_ranks(
            run_cases, cases[places[0]].world, str(data), files, given, store, timeout=timeout
        )
        for number, place in enumerate(places):
            reference = references[cases[place].numbers]
            found[place] = Outcome(
                cases[place], _merge([rank[number] for rank in ranks], reference), reference.noise
            )
    return [found[i] for i in range(len(cases))]


def _parts(places: list[int]) -> list[list[int]]:
    """So many cases that one start of ranks stays quick: gloo's threads outlive their process groups."""
    return [places[i : i + PER_START] for i in range(0, len(places), PER_START)]


def _merge(ranks: Sequence[dict[str, float]], reference: Reference) -> dict[str, float]:
    """The farthest rank's distance of every number; every number of the reference must be on some rank."""
    names = set[str]().union(*ranks)
    assert names == set(reference.noise), f"not on both sides: {sorted(names ^ set(reference.noise))}"
    return {name: max(rank.get(name, 0.0) for rank in ranks) for name in sorted(names)}
