"""Runs the parity matrix and writes it down: `python -m tools.parity_matrix` (about ten minutes on two
cores).

docs/parity.md gets every run, docs/parallelism.md a table of the worst of each. `--check` runs nothing: it
says whether the pages list exactly the runs that the matrix consists of today.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from tests.parity.cases import DENSE, Case, layouts, matrix
from tests.parity.matrix import BOUND, KINDS, Outcome, make_references, run_matrix
from tests.training import make_data

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- written by tools/parity_matrix.py -->", "<!-- end of what is written -->"
LETTERS = {"gpipe": "g", "1f1b": "f", "interleaved": "i", "zero_bubble": "z", "zbv": "v", "dualpipev": "d"}

HEAD = "\n".join(
    (
        "# Parity matrix",
        "",
        "Written by `python -m tools.parity_matrix`; a test compares its list with the layouts that "
        "the code calls legal.",
        "Each line is a run of five steps at a layout against the same run on one rank: the largest "
        "relative difference of a step's loss, and how far losses and gradient norms, parameters, "
        "optimizer moments, table rows and row state are from the one-rank run's, as multiples of the"
        " noise (the worst single tensor of each kind).",
        "Noise is how far the one-rank run is from itself when its sums are taken in other orders; "
        f"the bound is {BOUND:g}.",
        'What is compared and how: [parallelism.md](parallelism.md), "Every layout gives the numbers '
        'of one rank".',
        "",
        "| ranks | layout | schedule | variant | loss, relative | losses | parameters | moments | rows "
        "| row state |",
        "|--:|---|---|---|--:|--:|--:|--:|--:|--:|",
        "",
    )
)


@dataclass(frozen=True)
class Row:
    """A line of docs/parity.md, as text."""

    ranks: str
    layout: str
    schedule: str
    variant: str
    loss: str
    multiples: tuple[str, ...]

    @classmethod
    def of(cls, outcome: Outcome) -> Row:
        return cls(
            *_key(outcome.case),
            f"{outcome.distance['curve.loss']:.1e}",
            tuple(f"{outcome.worst(k):.1f}" for k in KINDS),
        )

    @classmethod
    def read(cls, line: str) -> Row:
        cells = [cell.strip() for cell in line.strip("|\n").split("|")]
        ranks, layout, schedule, variant, loss, *multiples = cells
        return cls(ranks, layout, schedule, variant, loss, tuple(multiples))

    def __str__(self) -> str:
        *cells, multiples = astuple(self)
        return f"| {' | '.join([*cells, *multiples])} |\n"

    @property
    def key(self) -> tuple[str, ...]:
        return self.ranks, self.layout, self.schedule, self.variant

    @property
    def worst(self) -> str:
        return max(self.multiples, key=float)

    def degree(self, axis: str) -> int:
        return next((int(part.split()[1]) for part in self.layout.split(" · ") if part.split()[0] == axis), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="compare the pages with the matrix, and run nothing"
    )
    if parser.parse_args().check:
        sys.exit("\n".join(problems()) or 0)
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder) / "data")
        outcomes = run_matrix(data, matrix(), make_references(data, matrix()), Path(folder), timeout=600)
    write([Row.of(outcome) for outcome in outcomes])


def write(rows: Sequence[Row]) -> None:
    """Both pages."""
    (DOCS / "parity.md").write_text(HEAD + "".join(map(str, rows)), encoding="utf-8")
    page = DOCS / "parallelism.md"
    before, _, after = _split(page.read_text(encoding="utf-8"))
    page.write_text(f"{before}{BEGIN}\n{compact(rows)}{END}{after}", encoding="utf-8")


def problems() -> list[str]:
    """In what the pages differ from the matrix and from each other."""
    text = (DOCS / "parity.md").read_text(encoding="utf-8")
    rows = [Row.read(line) for line in text.splitlines() if line[:2] == "| " and line[2].isdigit()]
    listed, wanted = [row.key for row in rows], [_key(case) for case in matrix()]
    out = [f"docs/parity.md lacks {' '.join(key)}" for key in wanted if key not in listed]
    out += [
        f"docs/parity.md has {' '.join(key)}, which is not a run of the matrix"
        for key in listed
        if key not in wanted
    ]
    _, table, _ = _split((DOCS / "parallelism.md").read_text(encoding="utf-8"))
    if not out and table != f"\n{compact(rows)}":
        out.append("the table of docs/parallelism.md is not that of docs/parity.md")
    return [f"{problem}; run: python -m tools.parity_matrix" for problem in out]


def compact(rows: Sequence[Row]) -> str:
    """Dense axes by expert axes; in a cell the worst multiple of each table (mem 1, 2, 4), with the letter of
    its schedule.
    """
    base = [row for row in rows if not row.variant and row.ranks != "8"]
    experts = sorted({_experts(row) for row in base})
    lines = [f"| ranks | dense axes | {' | '.join(_named(('ep', 'etp'), e) or 'ep 1' for e in experts)} |\n"]
    lines += [f"|--:|---|{'---|' * len(experts)}\n"]
    for ranks, dense in dict.fromkeys((row.ranks, _dense(row)) for row in base):
        cells = []
        for expert in experts:
            here = [row for row in base if (row.ranks, _dense(row), _experts(row)) == (ranks, dense, expert)]
            cells.append(
                " ".join(
                    row.worst + LETTERS.get(row.schedule, "")
                    for row in sorted(here, key=lambda r: r.degree("mem"))
                )
            )
        lines.append(f"| {ranks} | {_named(DENSE, dense)} | {' | '.join(cells)} |\n")
    others = [("8 ranks", [row for row in rows if row.ranks == "8"])]
    others += [
        (v, [row for row in rows if row.variant == v])
        for v in dict.fromkeys(r.variant for r in rows if r.variant)
    ]
    lines += ["\n| further | runs | worst | at |\n|---|--:|--:|---|\n"]
    for name, mine in others:
        worst = max(mine, key=lambda row: float(row.worst))
        many = f"{len(mine)} (of {len(layouts(8))} layouts)" if name == "8 ranks" else str(len(mine))
        lines.append(
            f"| {name} | {many} | {worst.worst} | "
            f"{worst.layout}{', ' * bool(worst.schedule)}{worst.schedule} |\n"
        )
    return "".join(lines)


def _key(case: Case) -> tuple[str, str, str, str]:
    return str(case.world), case.layout, case.schedule, case.variant


def _dense(row: Row) -> tuple[int, ...]:
    return tuple(row.degree(axis) for axis in DENSE)


def _experts(row: Row) -> tuple[int, int]:
    return row.degree("ep"), row.degree("etp")


def _named(axes: Sequence[str], degrees: Sequence[int]) -> str:
    return " · ".join(f"{axis} {degree}" for axis, degree in zip(axes, degrees, strict=True) if degree > 1)


def _split(page: str) -> tuple[str, str, str]:
    """What stands before, between and after the marks."""
    before, _, rest = page.partition(BEGIN)
    table, _, after = rest.partition(END)
    return before, table, after


if __name__ == "__main__":
    main()
