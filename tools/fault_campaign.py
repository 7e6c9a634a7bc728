"""Runs the fault campaign and writes what came of it into docs/reliability.md: `python -m
tools.fault_campaign`.

About six minutes on two cores. `--check` runs nothing: it says whether the page lists a campaign that passed,
of this seed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

from tests.faults.acts import PAUSE_SECONDS
from tests.faults.campaign import LEAST, SEED, STORIES, UNDER_TORCHRUN, draw, play, undisturbed
from tests.faults.judge import Outcome, Plan
from tests.faults.story import DAMAGE
from tests.ranks import PRELOAD
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
    "kill all": "SIGKILL of all ranks at once",
    "abandon": "SIGSTOP of one rank and SIGKILL of the other",
    "pause": f"a rank stands still for {PAUSE_SECONDS} s, which is less than the timeout",
    "nan": "a layer gives NaN",
    "fail": "file operations of a rank fail from some moment on (EIO)",
    "fill": "a full disk (tmpfs)",
    "vanish": "a data shard disappears",
    "cut": "a data shard is cut to half",
    **{kind: f"{kind} a file of the latest checkpoint" for kind in DAMAGE},
}


def run(plans: Sequence[Plan], folder: Path) -> Iterator[Outcome]:
    """Every outcome of a campaign, story by story. One story more is played than there are pairs of cores for
    its two ranks: one that waits, for a watchdog or for processes to start, leaves its cores to another.
    """
    data = make_data(folder / "data", documents=4)
    variants = dict.fromkeys(plan.variant for plan in plans)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "tests.faults.campaign"])
    with ProcessPoolExecutor(
        min(4, (os.cpu_count() or 1) // 2 + 1), context, initializer=_end_with_parent
    ) as pool:
        made = pool.map(
            undisturbed, repeat(data), [folder / f"undisturbed-{variant}" for variant in variants], variants
        )
        references = dict(zip(variants, made, strict=True))
        folders = [folder / f"story-{number}" for number in range(len(plans))]
        for outcomes in pool.map(
            play, plans, repeat(data), folders, [references[plan.variant] for plan in plans]
        ):
            yield from outcomes


def _end_with_parent() -> None:
    """A process of the pool would outlive a campaign that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def name_of(outcome: Outcome) -> str:
    """The line of the table in which a fault is counted."""
    fault = outcome.fault
    by = " (torchrun)" if outcome.plan.launcher == "torchrun" else ""
    if (fault.kind, fault.when) == ("hang", "file"):
        return "file operations of a rank never end from some moment on"
    if fault.kind != "kill":
        return NAMES[fault.kind] + by
    where = {"start": "at any time from its start", "file": "at a file operation of the run"}.get(
        fault.when, f"in {fault.when}"
    )
    return f"SIGKILL of a rank, {where}{by}"


def table(outcomes: Sequence[Outcome], seed: int, seconds: float) -> str:
    counts = Counter((name_of(outcome), outcome.ended) for outcome in outcomes)
    wrong = Counter(name_of(outcome) for outcome in outcomes if outcome.problem)
    runs = len({outcome.plan for outcome in outcomes})
    tree = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=PAGE.parent, capture_output=True, text=True
    ).stdout.strip()
    lines = [f"Seed {seed}: {len(outcomes)} faults in {runs} runs, {sum(wrong.values())} with a wrong end.\n"]
    lines += [f"Commit {tree or 'unknown'}, {os.cpu_count()} cores, {seconds:.0f} s.\n\n"]
    lines += [
        f"| fault | injected | {' | '.join(ENDS.values())} | wrong |\n|---|{'--:|' * (len(ENDS) + 2)}\n"
    ]
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
    out += (
        ["the lines do not add up"]
        if [sum(row[0] for row in rows), sum(row[5] for row in rows)] != [faults, wrong]
        else []
    )
    return out


def write(text: str) -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="look at the page, and run nothing")
    parser.add_argument(
        "--seed", type=int, default=SEED, help="another campaign; the page is then not written"
    )
    arguments = parser.parse_args()
    if arguments.check:
        sys.exit("\n".join(problems()) or 0)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = []
        for outcome in run(draw(arguments.seed, STORIES, UNDER_TORCHRUN), Path(folder)):
            outcomes.append(outcome)
            print(f"{len(outcomes):4d}  {outcome.fault}: {outcome.ended}  {outcome.problem}", flush=True)
    print(text := table(outcomes, arguments.seed, time.monotonic() - begin))
    if arguments.seed == SEED:
        write(text)
    sys.exit(any(outcome.problem for outcome in outcomes))


if __name__ == "__main__":
    main()
