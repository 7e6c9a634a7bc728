"""Does a step's time depend on the size of the lookup table? `python tools/bench_rows.py [--rows 200000
20000000] [--nproc 2]`

Trains the quickstart's model on the same batches with tables of different sizes, in turns (A B A B …), and
prints the median seconds per phase and the ratio of each size to the first, pair by pair. `--model-free`
leaves the model out: plan, fetch, push and update with made-up gradients. `--dense` sets an nn.Embedding with
torch's Adam, whose gradient and update are table-sized, beside the row path at the same sizes. `--fetch step
overlap stale` compares the ways of engram.fetch: "fetch" is what the step waits for, "hidden" what goes on
beside it.

Planning stands before the step here; in training it runs in the background, a step ahead.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Any, get_args

import torch
from torch import nn

from hybridtrain.data.batches import Batch, BatchLoader, BatchShare
from hybridtrain.data.prepare import ensure_prepared
from hybridtrain.data.shards import TokenDataset
from hybridtrain.errors import UserError
from hybridtrain.kernels.engram_hash.op import row_ids
from hybridtrain.launch.local import run_ranks
from hybridtrain.monitor.clock import Clock
from hybridtrain.parallel.early_rows import late_rows
from hybridtrain.parallel.layout import LayoutError
from hybridtrain.parallel.mesh import close_mesh
from hybridtrain.parallel.row_exchange import StepPlan
from hybridtrain.run.assemble import Run, Vocabulary, assemble, make_addressing
from hybridtrain.run.process_setup import join_world
from hybridtrain.run.step import Hooks, StepInput, train_step
from hybridtrain.settings.engram import FetchMode
from hybridtrain.settings.load import load_settings
from hybridtrain.settings.tree import Settings

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.toml"
MODULE = __spec__.name if __spec__ else Path(__file__).stem  # where ranks find `measure`


@dataclass(frozen=True)
class Options:
    """What to measure; travels to the ranks."""

    rows: tuple[int, ...]
    steps: int
    warmup: int
    nproc: int
    random_tokens: bool
    model_free: bool
    dense: bool
    overrides: tuple[str, ...]
    fetch: tuple[str, ...] = ("step",)
    out: str = ""


@dataclass
class Case:
    """One subject: what it is called, how to run a step of it, and what the timed steps came to."""

    name: str
    run: Callable[[int, Clock], dict[str, float]]  # what it returns stands beside the phases
    facts: dict[str, Any]
    seconds: list[dict[str, float]] = field(default_factory=list)
    faults: list[int] = field(default_factory=list)


def main(argv: list[str] | None = None) -> None:
    options, as_json = _parse(argv)
    try:
        settings = _settings(options, options.rows[0])
        _check_memory(options, settings.engram.head_dim)
        ensure_prepared(settings.data)
        with tempfile.TemporaryDirectory(prefix="bench-rows-") as folder:
            options = Options(**{**options.__dict__, "out": str(Path(folder) / "result.json")})
            if options.nproc == 1:
                measure(options)
            elif status := run_ranks(f"{MODULE}:measure", (options,), options.nproc):
                raise SystemExit(status)
            result = json.loads(Path(options.out).read_text(encoding="utf-8"))
    except (UserError, LayoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(json.dumps(result, indent=1) if as_json else render(result))


def measure(options: Options) -> None:
    """Run all cases in turns and let rank 0 write the result to `options.out`. Every rank calls it."""
    torch.manual_seed(0)
    settings = _settings(options, options.rows[0])
    mesh = join_world(settings)
    try:
        dataset = TokenDataset.open(settings.data.path, verify=False)
        vocabulary = Vocabulary.of(dataset)
        batches = _batches(
            settings, dataset, mesh.layout.coordinate(mesh.rank, "dp"), mesh.layout.dp, options
        )
        cases = list(_cases(options, vocabulary, batches, mesh))
        clock = Clock(mesh.device)
        for step in range(options.warmup + options.steps):
            for case in cases if step % 2 == 0 else cases[::-1]:  # neither is always the one after the other
                faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                begin, cpu_begin = time.perf_counter(), time.process_time()
                beside = case.run(step, clock)
                total, cpu = time.perf_counter() - begin, time.process_time() - cpu_begin
                if step >= options.warmup:
                    case.seconds.append({"step": total, "cpu": cpu, **clock.take(), **beside})
                    case.faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
                clock.take()
        if mesh.rank == 0:
            Path(options.out).write_text(json.dumps(summarise(cases, options)), encoding="utf-8")
    finally:
        close_mesh()


def summarise(cases: list[Case], options: Options) -> dict[str, Any]:
    """Medians per phase, and for each case the ratio of its step to the first case's, pair by pair (median
    and quartiles).

    By the clock, and by this process's CPU time, which other work on the machine disturbs less.
    """
    first = cases[0].seconds
    out = []
    for case in cases:
        phases = {name: median(s[name] for s in case.seconds) for name in case.seconds[0]}
        out.append(
            {
                "case": case.name,
                **case.facts,
                "seconds": phases,
                "ratio": _ratio(case.seconds, first, "step"),
                "cpu_ratio": _ratio(case.seconds, first, "cpu"),
                "page_faults_per_step": median(case.faults),
            }
        )
    return {
        "torch": torch.__version__,
        "nproc": options.nproc,
        "threads": torch.get_num_threads(),
        "steps": options.steps,
        "tokens": "random" if options.random_tokens else "text",
        "model": "none" if options.model_free or options.dense else CONFIG.name,
        "cases": out,
    }


def _ratio(mine: list[dict[str, float]], theirs: list[dict[str, float]], key: str) -> dict[str, Any]:
    low, middle, high = quantiles((a[key] / b[key] for a, b in zip(mine, theirs, strict=True)), n=4)
    return {"median": middle, "quartiles": [low, high]}


def render(result: dict[str, Any]) -> str:
    """The result as a markdown table: milliseconds."""
    phases = list(dict.fromkeys(name for case in result["cases"] for name in case["seconds"]))
    lines = [
        f"{result['nproc']} rank(s) x {result['threads']} thread(s), torch {result['torch']}, "
        f"{result['tokens']} tokens, model: {result['model']}; medians of {result['steps']} steps in "
        "milliseconds",
        "",
        f"| case | unique rows | {' | '.join(phases)} | ratio (quartiles) | CPU time ratio |",
        f"|---|--:|{'--:|' * len(phases)}--:|--:|",
    ]
    for case in result["cases"]:
        times = [f"{1000 * case['seconds'][p]:.2f}" if p in case["seconds"] else "" for p in phases]
        cells = [case["case"], f"{case['unique_rows']:,}", *times]
        for ratio in (case["ratio"], case["cpu_ratio"]):
            cells.append("{:.2f} ({:.2f}-{:.2f})".format(ratio["median"], *ratio["quartiles"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cases(
    options: Options, vocabulary: Vocabulary, batches: Callable[[int], Batch], mesh: Any
) -> Iterator[Case]:
    for rows, fetch in product(options.rows, options.fetch):
        settings = _settings(options, rows, f"engram.fetch={fetch}")
        run = assemble(settings, mesh, vocabulary, make_addressing(settings, vocabulary))
        assert run.table is not None
        first, second = (run.table.plan(batches(options.warmup + i)) for i in range(2))
        facts = {
            "rows": run.table.addressing.num_rows,
            "unique_rows": first.unique,
            "late_rows": late_rows(second),
            "table_bytes_here": run.table.weight.nbytes,
            "row_state_bytes_here": sum(value.nbytes for value in run.table.optimizer.state.values()),
        }
        name = f"{run.table.addressing.num_rows:,} rows" + (f", {fetch}" if len(options.fetch) > 1 else "")
        yield Case(f"{name}, row path" if options.dense else name, _row_step(run, batches, options), facts)
        if options.dense:
            yield Case(f"{name}, nn.Embedding + Adam", _dense_step(run, batches), facts)


def _row_step(
    run: Run, batches: Callable[[int], Batch], options: Options
) -> Callable[[int, Clock], dict[str, float]]:
    table = run.table
    assert table is not None
    planned: dict[int, tuple[Batch, StepPlan]] = {}

    def plan_once(number: int, clock: Clock) -> tuple[Batch, StepPlan]:
        if number not in planned:
            batch = batches(number)
            with clock.phase("plan"):
                planned[number] = batch, table.plan(batch)
        return planned[number]

    def step(number: int, clock: Clock) -> dict[str, float]:
        batch, plan = plan_once(number, clock)
        if not (options.model_free or options.dense):
            _, next_plan = plan_once(number + 1, clock)
            train_step(run, number, StepInput(batch, plan, next_plan), Hooks(clock.phase))
            del planned[number]
            return {"hidden": table.hidden_seconds()}
        exchange = plan.exchanges[0]
        with clock.phase("fetch"):
            table.fetch(plan, exchange)
        for leaf in table.leaves.parameters():
            leaf.grad = torch.full_like(leaf, 1e-3)
        with clock.phase("push"):
            total_ND = table.new_gradient(plan)
            table.push(exchange, total_ND)
        with clock.phase("optimizer"):
            table.update(plan, total_ND, 1e-3)
        del planned[number]
        return {}

    return step


def _dense_step(run: Run, batches: Callable[[int], Batch]) -> Callable[[int, Clock], dict[str, float]]:
    table = run.table
    assert table is not None
    dense = nn.Embedding(table.addressing.num_rows, table.weight.shape[1])
    optimizer = torch.optim.Adam(dense.parameters(), lr=1e-3)

    def step(number: int, clock: Clock) -> dict[str, float]:
        batch = batches(number)
        with clock.phase("plan"):
            ids = row_ids(table.addressing, batch.tokens, batch.starts)
        with clock.phase("fetch"):
            rows = dense(ids)
        with clock.phase("push"):
            rows.backward(torch.full_like(rows, 1e-3))
        with clock.phase("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
        return {}

    return step


def _batches(
    settings: Settings, dataset: TokenDataset, dp_rank: int, dp: int, options: Options
) -> Callable[[int], Batch]:
    train = settings.train
    share = BatchShare(train.global_batch, 1, dp_rank, dp)
    loader = BatchLoader(dataset.split("train"), train.seq_len, share, settings.run.seed)

    def load(step: int) -> Batch:
        batch = loader.load(step)
        if not options.random_tokens:
            return batch
        generator = torch.Generator().manual_seed(step * dp + dp_rank)
        tokens = torch.randint(1, dataset.manifest.vocab_size, batch.tokens.shape, generator=generator)
        return Batch(tokens, tokens.roll(-1, -1), torch.zeros_like(batch.starts))

    return load


def _settings(options: Options, rows: int, *others: str) -> Settings:
    base = load_settings(CONFIG)
    slots = len(base.engram.orders) * base.engram.heads
    layout = ["parallel.ep=1"] if options.nproc == 1 else []
    size = [f"engram.rows_per_head={-(-rows // slots)}", "parallel.mem=-1"]
    return load_settings(CONFIG, [*size, *layout, *options.overrides, *others])


def _parse(argv: list[str] | None) -> tuple[Options, bool]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="section.key=value on top of the quickstart's settings")
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[200_000, 20_000_000],
        help="sizes of the packed table; ratios refer to the first",
    )
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each size")
    parser.add_argument(
        "--warmup", type=int, default=4, help="steps before, for first touches of pages and buffers"
    )
    parser.add_argument("--nproc", type=int, default=1, help="ranks; the table is sharded over all of them")
    parser.add_argument(
        "--random-tokens",
        action="store_true",
        help="uniform tokens: hardly a row occurs twice, in a step or between steps",
    )
    parser.add_argument("--model-free", action="store_true", help="plan, fetch, push and update alone")
    parser.add_argument(
        "--dense",
        action="store_true",
        help="compare with nn.Embedding and torch's Adam, model-free, one rank",
    )
    parser.add_argument(
        "--fetch",
        nargs="+",
        choices=get_args(FetchMode),
        default=["step"],
        help="ways of engram.fetch to compare",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    if args.steps < 2 or args.warmup < 0 or min(args.rows) < 1 or args.nproc < 1:
        parser.error("--steps must be at least 2, --rows and --nproc at least 1, --warmup at least 0")
    if args.dense and args.nproc > 1:
        parser.error("--dense compares on one rank; leave --nproc out")
    if len(args.fetch) > 1 and (args.dense or args.model_free):
        parser.error("--fetch compares what goes on beside a model; leave --dense and --model-free out")
    options = Options(
        tuple(args.rows),
        args.steps,
        args.warmup,
        args.nproc,
        args.random_tokens,
        args.model_free,
        args.dense,
        tuple(args.overrides),
        tuple(args.fetch),
    )
    return options, args.json


def _check_memory(options: Options, head_dim: int) -> None:
    tables = 5 if options.dense else 1  # dense: weights, gradient and two moments beside the row path's table
    needed, free = len(options.fetch) * sum(options.rows) * (4 * head_dim * tables + 8), _available_bytes()
    if needed > free:
        raise UserError(
            f"tables of {sum(options.rows):,} rows need about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are "
            "free"
        )


def _available_bytes() -> int:
    """What a process may take without swapping; without Linux's account of it, all there is."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
