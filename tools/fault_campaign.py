"""Runs the fault campaign and writes what came of it into docs/reliability.md: `python -m tools.fault_campaign`.

About ten minutes on two cores. `--check` runs nothing: it says whether the page lists a campaign that passed, of this seed.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.faults.campaign import LEAST, SEED, STORIES, UNDER_TORCHRUN, Outcome, draw, play, undisturbed
from tests.faults.inject import DAMAGE
from tests.training import make_data

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- written by tools/fault_campaign.py -->", "<!-- end of what is written -->"
ENDS = {
    "restarted": "restarted",
    "fell back": "went on from the checkpoint before",
    "refused": "refused, cause named",
    "unharmed": "harmless",
}
NAMES = {
    "stop": "SIGSTOP of a rank, at a phase",
    "hang": "a lock that a rank waits for forever, at a phase",
    "fail": "file operations of a rank fail from some moment on (EIO)",
    "fill": "a full disk (tmpfs)",
    "vanish": "a data shard disappears",
    **{kind: f"{kind} a file of the latest checkpoint" for kind in DAMAGE},
}


def run(seed: int, stories: int, with_torchrun: int, folder: Path) -> Iterator[Outcome]:
    """Every outcome of the campaign of this seed, story by story."""
    data = make_data(folder / "data", documents=4)
    references: dict[str, Path] = {}
    for number, plan in enumerate(draw(seed, stories, with_torchrun)):
        if plan.variant not in references:
            references[plan.variant] = undisturbed(data, folder / f"undisturbed-{plan.variant}", plan.variant)
        yield from play(plan, data, folder / f"story-{number}", references[plan.variant])


def name_of(outcome: Outcome) -> str:
    """The line of the table in which a fault is counted."""
    fault = outcome.fault
    if fault.kind != "kill":
        return NAMES[fault.kind]
    where = {"start": "at any time from its start", "file": "at a file operation of the run"}.get(fault.when, f"in {fault.when}")
    return f"SIGKILL of a rank, {where}" + (" (torchrun)" if outcome.plan.launcher == "torchrun" else "")


def table(outcomes: Sequence[Outcome], seed: int) -> str:
    counts = Counter((name_of(outcome), outcome.ended) for outcome in outcomes)
    wrong = Counter(name_of(outcome) for outcome in outcomes if outcome.problem)
    runs = len({outcome.plan for outcome in outcomes})
    lines = [f"Seed {seed}: {len(outcomes)} faults in {runs} runs, {sum(wrong.values())} with a wrong end.\n\n"]
    lines += [f"| fault | injected | {' | '.join(ENDS.values())} | wrong |\n|---|{'--:|' * (len(ENDS) + 2)}\n"]
    for name in sorted({name for name, _ in counts}):
        cells = [counts[name, end] for end in ENDS]
        lines.append(f"| {name} | {sum(cells)} | {' | '.join(map(str, cells))} | {wrong[name]} |\n")
    return "".join(lines)


def problems() -> list[str]:
    """In what the page is not that of a campaign of this seed that passed."""
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    text = rest.partition(END)[0]
    said = re.search(r"Seed (\d+): (\d+) faults in (\d+) runs, (\d+) with a wrong end", text)
    if said is None:
        return [f"{PAGE.name} has no table; run: python -m tools.fault_campaign"]
    seed, faults, runs, wrong = map(int, said.groups())
    rows = [
        [int(cell) for cell in line.split("|")[2:8]]
        for line in text.splitlines()
        if line.startswith("| ") and "injected" not in line
    ]
    out = [f"the campaign of seed {SEED} is not that of seed {seed} in {PAGE.name}"] if seed != SEED else []
    out += [f"{faults} faults are fewer than {LEAST}"] if faults < LEAST else []
    out += [f"{runs} runs are not {STORIES + UNDER_TORCHRUN}"] if runs != STORIES + UNDER_TORCHRUN else []
    out += [f"{wrong} faults ended wrong"] if wrong else []
    out += ["the lines do not add up"] if [sum(row[0] for row in rows), sum(row[5] for row in rows)] != [faults, wrong] else []
    return out


def write(text: str) -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="look at the page, and run nothing")
    parser.add_argument("--seed", type=int, default=SEED, help="another campaign; the page is then not written")
    arguments = parser.parse_args()
    if arguments.check:
        sys.exit("\n".join(problems()) or 0)
    with tempfile.TemporaryDirectory() as folder:
        outcomes = []
        for outcome in run(arguments.seed, STORIES, UNDER_TORCHRUN, Path(folder)):
            outcomes.append(outcome)
            print(f"{len(outcomes):4d}  {outcome.fault}: {outcome.ended}  {outcome.problem}", flush=True)
    print(text := table(outcomes, arguments.seed))
    if arguments.seed == SEED:
        write(text)
    sys.exit(any(outcome.problem for outcome in outcomes))


if __name__ == "__main__":
    main()
