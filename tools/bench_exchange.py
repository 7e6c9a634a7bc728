"""Rows of the table over ranks: planned once a step, beside a lookup in every layer: `python -m
tools.bench_exchange [--nproc 2]`

Both ways serve the quickstart's Engram layers with the same batches and update the same rows by the same
row-wise rule, in turns, without a model around them:

- planned: this project's. One deduplicated exchange of rows a step and one of gradients, by a plan made from
  tokens alone, which is timed with it and without: in training it is made in the background.
- in the layer: what a sharded embedding does inside forward and backward: for each Engram layer and
  micro-batch the ids to their owners, every row back, every gradient to the owners; nothing is deduplicated
  before the owner's update.

Printed: milliseconds, the ratio step by step (median and quartiles), bytes that a rank sends to others,
collectives. For the dense table of one process (nn.Embedding with Adam) see `bench_rows.py --dense`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from hybridtrain.data.batches import Batch, BatchLoader, BatchShare
from hybridtrain.data.prepare import ensure_prepared
from hybridtrain.data.shards import TokenDataset
from hybridtrain.errors import UserError
from hybridtrain.kernels.engram_hash.op import row_ids
from hybridtrain.kernels.rows.op import segment_sum
from hybridtrain.launch.local import run_ranks
from hybridtrain.model.engram import StepRows
from hybridtrain.parallel.collectives import all_to_all, barrier, exchange_counts
from hybridtrain.parallel.layout import LayoutError
from hybridtrain.parallel.mesh import Mesh, close_mesh
from hybridtrain.run.assemble import Vocabulary, make_addressing
from hybridtrain.run.process_setup import join_world
from hybridtrain.settings.layers import engram_layers
from hybridtrain.settings.load import load_settings
from hybridtrain.settings.tree import Settings
from hybridtrain.table.lookup_table import LookupTable

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.toml"
MODULE = __spec__.name if __spec__ else Path(__file__).stem  # where ranks find `measure`
GRADIENT, LEARNING_RATE = 1e-3, 1e-3  # made up: every lookup's gradient


@dataclass(frozen=True)
class Options:
    """What to measure; travels to the ranks."""

    steps: int
    warmup: int
    nproc: int
    overrides: tuple[str, ...]
    out: str = ""


@dataclass
class Way:
    """One way to serve a step, and what its timed steps came to."""

    name: str
    run: Callable[[int], dict[str, float]]  # step -> seconds by name, "all" among them
    seconds: list[dict[str, float]] = field(default_factory=list)
    traffic: dict[str, list[int]] = field(
        default_factory=dict
    )  # by group: calls and bytes sent, of the last step


def planned(table: LookupTable, batches: Callable[[int], Batch]) -> Way:
    """The project's own: plan, fetch, push, update."""

    def step(number: int) -> dict[str, float]:
        begin = time.perf_counter()
        plan = table.plan(batches(number))
        made = time.perf_counter()
        total_ND = table.new_gradient(plan)
        for exchange in plan.exchanges:
            table.fetch(plan, exchange)
            for leaf, index in zip(table.leaves.parameters(), exchange.index, strict=True):
                places = index.flatten()  # the model's lookup and its gradient
                rows = leaf.detach().index_select(0, places)
                leaf.grad = torch.zeros_like(leaf).index_add_(0, places, torch.full_like(rows, GRADIENT))
            table.push(exchange, total_ND)
        table.update(plan, total_ND, LEARNING_RATE)
        return {"all": time.perf_counter() - begin, "without plan": time.perf_counter() - made}

    return Way("planned", step)


def in_the_layer(table: LookupTable, mesh: Mesh, batches: Callable[[int], Batch]) -> Way:
    """A lookup in every layer of every micro-batch: ids out, rows back, gradients out."""
    mem, bounds = mesh.mem, torch.tensor(mesh.layout.row_bounds(table.addressing.num_rows))

    def look_up(ids_X: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
        """The rows [X, D], and what takes their gradients to the owners: (their local rows, gradients)."""
        owner_X = torch.bucketize(ids_X, bounds[1:], right=True)
        order_X = torch.argsort(owner_X, stable=True)
        asked = torch.bincount(owner_X, minlength=mem.size)
        send, receive = asked.tolist(), exchange_counts(asked, mem).tolist()
        wanted_Q = all_to_all(ids_X[order_X], send, receive, mem) - table.low
        sorted_XD = all_to_all(table.weight.index_select(0, wanted_Q), receive, send, mem)
        rows_XD = torch.empty_like(sorted_XD).index_copy_(0, order_X, sorted_XD)
        return rows_XD, lambda grad_XD: (
            wanted_Q,
            all_to_all(grad_XD.index_select(0, order_X), send, receive, mem),
        )

    def step(number: int) -> dict[str, float]:
        begin = time.perf_counter()
        batch = batches(number)
        wanted: list[Tensor] = []
        grads: list[Tensor] = []
        for tokens, starts in zip(batch.tokens, batch.starts, strict=True):
            ids = row_ids(table.addressing, tokens[None], starts[None])[0]
            looked_up = [look_up(ids[:, :, layer].flatten()) for layer in range(ids.size(2))]  # forward
            for rows_XD, give_back in looked_up[::-1]:  # backward
                wanted_Q, grad_QD = give_back(torch.full_like(rows_XD, GRADIENT))
                wanted.append(wanted_Q)
                grads.append(grad_QD)
        touched_N, slot_Q = torch.unique(torch.cat(wanted), return_inverse=True)
        table.optimizer.step(touched_N, segment_sum(torch.cat(grads), slot_Q, len(touched_N)), LEARNING_RATE)
        seconds = time.perf_counter() - begin
        return {"all": seconds, "without plan": seconds}

    return Way("in the layer", step)


def measure(options: Options) -> None:
    """Both ways in turns on equal tables; rank 0 writes the result to `options.out`. Every rank calls it.

    Raises RuntimeError where the two tables end apart: then one of the ways is wrong.
    """
    settings = _settings(options)
    mesh = join_world(settings)
    try:
        dataset = TokenDataset.open(settings.data.path, verify=False)
        addressing = make_addressing(settings, Vocabulary.of(dataset))
        assert addressing is not None
        tables = [
            LookupTable(settings, addressing, mesh, StepRows(), engram_layers(settings)) for _ in range(2)
        ]
        train, dp = settings.train, mesh.layout.dp
        share = BatchShare(
            train.global_batch, train.micro_batches, mesh.layout.coordinate(mesh.rank, "dp"), dp
        )
        loader = BatchLoader(dataset.split("train"), train.seq_len, share, seed=0)
        ways = [planned(tables[0], loader.load), in_the_layer(tables[1], mesh, loader.load)]
        for number in range(options.warmup + options.steps):
            for way in ways if number % 2 == 0 else ways[::-1]:
                barrier(mesh.world)
                before = mesh.traffic.entries()
                seconds = way.run(number)
                if number >= options.warmup:
                    way.seconds.append(seconds)
                way.traffic = _difference(before, mesh.traffic.entries())
        torch.testing.assert_close(tables[0].weight, tables[1].weight, atol=1e-5, rtol=1e-4)
        if mesh.rank == 0:
            plan = tables[0].plan(loader.load(0))
            facts = {
                "lookups": plan.lookups,
                "unique": plan.unique,
                "rows": addressing.num_rows,
                "dim": settings.engram.head_dim,
            }
            Path(options.out).write_text(json.dumps(summarise(ways, options, facts)), encoding="utf-8")
        else:
            tables[0].plan(loader.load(0))
    finally:
        close_mesh()


def summarise(ways: list[Way], options: Options, facts: dict[str, int]) -> dict[str, Any]:
    """Medians, and each way's ratio to the first, step by step: [median, lower quartile, upper quartile]."""
    out = []
    for way in ways:
        names = way.seconds[0]
        out.append(
            {
                "way": way.name,
                "seconds": {name: median(s[name] for s in way.seconds) for name in names},
                "ratio": {
                    name: _spread(
                        [a[name] / b[name] for a, b in zip(way.seconds, ways[0].seconds, strict=True)]
                    )
                    for name in names
                },
                "traffic": way.traffic,
            }
        )
    return {"nproc": options.nproc, "steps": options.steps, **facts, "ways": out}


def render(result: dict[str, Any]) -> str:
    """The result as a markdown table."""
    lines = [
        f"{result['nproc']} ranks, {result['steps']} steps; {result['lookups']:,} lookups a step and rank, "
        f"{result['unique']:,} unique rows, table {result['rows']:,} x {result['dim']}",
        "",
        "| way | ms | ratio | ms, plan made before | ratio | collectives a step | kB sent a step |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for way in result["ways"]:
        cells = []
        for name in ("all", "without plan"):
            cells += [
                f"{1000 * way['seconds'][name]:.1f}",
                "{:.2f} ({:.2f}-{:.2f})".format(*way["ratio"][name]),
            ]
        calls, sent = (sum(entry[i] for entry in way["traffic"].values()) for i in (0, 1))
        lines.append(f"| {way['way']} | {' | '.join(cells)} | {calls} | {sent / 1000:,.0f} |")
    return "\n".join(lines)


def _difference(
    before: dict[Any, tuple[int, int]], after: dict[Any, tuple[int, int]]
) -> dict[str, list[int]]:
    """Calls and bytes by group; the barrier of the measurement is none of the ways'."""
    out: dict[str, list[int]] = {}
    for key, (calls, sent) in after.items():
        old_calls, old_sent = before.get(key, (0, 0))
        entry = out.setdefault(key[0], [0, 0])
        entry[0] += calls - old_calls
        entry[1] += sent - old_sent
    return {group: entry for group, entry in out.items() if entry[0]}


def _spread(values: list[float]) -> list[float]:
    low, _, high = quantiles(values, n=4, method="inclusive")
    return [median(values), low, high]


def _settings(options: Options) -> Settings:
    return load_settings(CONFIG, ["parallel.mem=-1", "engram.weight_decay=0.0", *options.overrides])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        help="section.key=value on top of the quickstart's settings, e.g. train.micro_batches=4",
    )
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each way")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--nproc", type=int, default=2, help="ranks; the table is sharded over all of them")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    if args.steps < 2 or args.warmup < 0 or args.nproc < 1:
        parser.error("--steps must be at least 2, --nproc at least 1, --warmup at least 0")
    options = Options(args.steps, args.warmup, args.nproc, tuple(args.overrides))
    try:
        ensure_prepared(_settings(options).data)
        with tempfile.TemporaryDirectory(prefix="bench-exchange-") as folder:
            options = replace(options, out=str(Path(folder) / "result.json"))
            if status := run_ranks(f"{MODULE}:measure", (options,), options.nproc):
                raise SystemExit(status)
            result = json.loads(Path(options.out).read_text(encoding="utf-8"))
    except (UserError, LayoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(json.dumps(result, indent=1) if args.json else render(result))


if __name__ == "__main__":
    main()
