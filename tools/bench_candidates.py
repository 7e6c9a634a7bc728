"""Does each op take torch's fastest form on the CPU? `python -m tools.bench_candidates [--page .]`

Times forward and backward of every op as a run does it and in other formulations, at the shapes of
`configs/quickstart.toml` on one of its two ranks, in turns (A B C, C A B, …), by the process's CPU time.
First it checks that all formulations agree. With --page the table goes into docs/performance.md of the
checkout.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from hybridtrain.run.process_setup import keep_freed_memory
from tools.candidates import Form, Race, races

START, END = "<!-- written by tools/bench_candidates.py --page -->", "<!-- end of what is written -->"
PAGE = Path("docs/performance.md")


def call_of(race: Race, form: Form) -> Callable[[], list[Tensor]]:
    """Forward and, where an input wants it, backward: the output and the gradients."""
    leaves = [t for t in race.inputs if isinstance(t, Tensor) and t.requires_grad]
    grad: Tensor | None = None

    def call() -> list[Tensor]:
        nonlocal grad
        out = form(*race.inputs)
        if not leaves:
            return [out]
        if grad is None:
            grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    return call


def check(race: Race) -> None:
    """Raises AssertionError naming the form whose output or gradients are not the first form's."""
    wanted, *others = ((name, call_of(race, form)()) for name, form in race.forms.items())
    for name, got in others:
        for ours, theirs in zip(wanted[1], got, strict=True):
            torch.testing.assert_close(
                theirs, ours, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{race.op}, {n}: {text}"
            )


def measure(race: Race, rounds: int, seconds: float) -> dict[str, tuple[float, tuple[float, float, float]]]:
    """By form: median CPU seconds of a call, and median and quartiles of its ratio to the first form's in the
    same round.

    A form runs for about `seconds` in each round; the order of the forms turns from round to round.
    """
    calls = {name: call_of(race, form) for name, form in race.forms.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    counts = {name: max(1, round(seconds / _seconds(call, 3))) for name, call in calls.items()}
    names = list(calls)
    for number in range(rounds):
        turned = names[number % len(names) :] + names[: number % len(names)]
        for name in turned if number % 2 else turned[::-1]:
            times[name].append(_seconds(calls[name], counts[name]))
    first = times[names[0]]
    return {
        name: (median(own), _quartiles([a / b for a, b in zip(own, first, strict=True)]))
        for name, own in times.items()
    }


def _seconds(call: Callable[[], Any], count: int) -> float:
    call()  # what the form before left in the cache is not its own
    begin = time.process_time()
    for _ in range(count):
        call()
    return max(time.process_time() - begin, 1e-9) / count


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, _, high = quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return median(values), low, high


def render(results: Sequence[tuple[Race, dict[str, tuple[float, tuple[float, float, float]]]]]) -> str:
    lines = [
        "| op | shape | formulation | µs of CPU time | against what a run takes |",
        "|---|---|---|--:|--:|",
    ]
    for race, measured in results:
        for number, (name, (took, (ratio, low, high))) in enumerate(measured.items()):
            against = f"{ratio:.2f} ({low:.2f}-{high:.2f})" if number else "taken"
            head = f"| {race.op} | {race.shape} |" if not number else "| | |"
            lines.append(f"{head} {name} | {took * 1e6:,.0f} | {against} |")
    return "\n".join(lines) + "\n"


def write_page(page: Path, table: str) -> None:
    """Put the table between the marks of the page. Raises ValueError where it has none."""
    before, start, rest = page.read_text(encoding="utf-8").partition(START)
    if not start:
        raise ValueError(f"{page} has no line {START}")
    page.write_text(f"{before}{START}\n\n{table}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--seconds", type=float, default=0.05, help="of a form in a round")
    parser.add_argument("--ops", default="", help="those whose names begin so")
    parser.add_argument("--page", type=Path, help="a checkout: write its docs/performance.md too")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()  # as a run does, and
    torch.set_flush_denormal(True)
    results = []
    for race in races():
        if race.op.startswith(options.ops):
            check(race)
            results.append((race, measure(race, options.rounds, options.seconds)))
            print(render(results[-1:]), flush=True)
    if options.page is not None:
        write_page(options.page / PAGE, render(results))


if __name__ == "__main__":
    main()
