"""How fast are checkpoints beside `dd` to the same disk? `python tools/bench_checkpoint.py [--dir FOLDER]
[--rows 8000000]`

The quickstart's model with a large table, in rounds of: `dd` of the files of a checkpoint with `conv=fsync`
and a save, in turns first, a reshard of what was saved for four ranks (where --nproc is 1), a check of all
checksums, a load, and a save in the background of training steps. Prints medians, the ratio of each to the dd
of its round, and the share of the background save in which the loop waited for it. What is read was written
just before, so it comes out of the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from hybridtrain import checkpoint
from hybridtrain.data.batches import BatchLoader, BatchShare
from hybridtrain.data.prepare import ensure_prepared
from hybridtrain.data.shards import TokenDataset
from hybridtrain.errors import UserError
from hybridtrain.launch.local import run_ranks
from hybridtrain.monitor.clock import Clock
from hybridtrain.parallel.collectives import all_reduce_, barrier
from hybridtrain.parallel.layout import LayoutError
from hybridtrain.parallel.mesh import close_mesh
from hybridtrain.reshard import reshard
from hybridtrain.run.assemble import Run, Vocabulary, assemble, make_addressing
from hybridtrain.run.process_setup import join_world
from hybridtrain.run.step import Hooks, StepInput, train_step
from hybridtrain.settings.load import load_settings
from hybridtrain.settings.tree import Settings

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.toml"
MODULE = __spec__.name if __spec__ else Path(__file__).stem  # where ranks find `measure`
STEPS = ("dd", "save", "reshard", "verify", "load", "background save")


@dataclass(frozen=True)
class Options:
    """What to measure; travels to the ranks."""

    rows: int
    rounds: int
    nproc: int
    folder: str
    out: str
    overrides: tuple[str, ...]


def main(argv: list[str] | None = None) -> None:
    options, as_json = _parse(argv)
    try:
        ensure_prepared(_settings(options).data)
        with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=options.folder or None) as folder:
            options = replace(options, folder=folder, out=str(Path(folder) / "result.json"))
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
    """All rounds; rank 0 writes the result to `options.out`. Every rank calls it."""
    settings = _settings(options)
    mesh = join_world(settings)
    try:
        dataset = TokenDataset.open(settings.data.path, verify=False)
        vocabulary = Vocabulary.of(dataset)
        run = assemble(settings, mesh, vocabulary, make_addressing(settings, vocabulary))
        trainer = _Trainer(run, dataset)
        trainer.step()  # optimizers make their state
        rounds = [_round(trainer, options, number) for number in range(options.rounds + 1)][
            1:
        ]  # the first warms up
        if mesh.rank == 0:
            Path(options.out).write_text(json.dumps(summarise(rounds, options)), encoding="utf-8")
    finally:
        close_mesh()


def _round(trainer: _Trainer, options: Options, number: int) -> dict[str, float]:
    """Seconds of each of STEPS, `blocked` ones of the last, bytes, and training steps beside it."""
    run, folder = trainer.run, Path(options.folder) / "checkpoints"
    world = run.mesh.world
    seconds: dict[str, float] = {}
    path = folder

    def timed(name: str, act: Callable[[], Any]) -> Any:
        os.sync()  # the disk has nothing left to do
        barrier(world)
        begin = time.perf_counter()
        result = act()
        barrier(world)
        seconds[name] = time.perf_counter() - begin
        return result

    target = Path(options.folder) / "dd"

    def copy() -> None:
        if number and world.rank == 0:
            _dd(folder / f"step-{2 * number:08d}", target)  # what the round before has left

    saver = trainer.saver(folder, background=False)
    works: list[tuple[str, Callable[[], Any]]] = [("dd", copy), ("save", lambda: saver.save(2 * number + 1))]
    for name, work in works if number % 2 else works[::-1]:
        path = timed(name, work) or path
        if world.rank == 0:
            for file in target.parent.glob(f"{target.name}-*"):
                file.unlink()
    size = sum(record["size"] for record in checkpoint.read_info(path)["files"].values())
    if (
        world.size == 1
    ):  # a tool of one process; from the save's files to those of four ranks, checked before and behind
        timed(
            "reshard",
            lambda: reshard(
                path, Path(options.folder) / "resharded", ["parallel.tp=2", "parallel.mem=4"], nproc=4
            ),
        )
        shutil.rmtree(Path(options.folder) / "resharded")
    timed("verify", lambda: checkpoint.verify(path, "full", world))
    timed("load", lambda: checkpoint.load(run, path))
    saver = trainer.saver(folder, background=True)
    steps, blocked = timed("background save", lambda: trainer.steps_beside(saver, 2 * number + 2))
    return {**seconds, "blocked": blocked, "bytes": float(size), "steps": float(steps)}


class _Trainer:
    """Steps of the run, outside of the real loop."""

    def __init__(self, run: Run, dataset: TokenDataset) -> None:
        train, mesh = run.settings.train, run.mesh
        place = mesh.layout.coordinate(mesh.rank, "dp")
        self.run, self.done = run, 0
        self.clock = Clock(mesh.device)
        share = BatchShare(train.global_batch, train.micro_batches, place, mesh.layout.dp)
        self._loader = BatchLoader(dataset.split("train"), train.seq_len, share, seed=0)

    def saver(self, folder: Path, background: bool) -> checkpoint.Saver:
        settings = self.run.settings
        ours = replace(
            self.run,
            settings=settings.model_copy(
                update={"checkpoint": settings.checkpoint.model_copy(update={"background": background})}
            ),
        )
        return checkpoint.Saver(ours, folder, "")

    def step(self, stop: bool = False, before_update: Callable[[], None] = lambda: None) -> bool:
        """One training step; whether any rank asked for a stop."""
        assert self.run.table is not None
        batch = self._loader.load(self.done)
        plan = self.run.table.plan(batch)
        totals = train_step(
            self.run,
            self.done,
            StepInput(batch, plan),
            Hooks(self.clock.phase, before_update, lambda: (stop, False)),
        )
        self.done += 1
        return totals.stop

    def steps_beside(self, saver: checkpoint.Saver, number: int) -> tuple[int, float]:
        """Train until the save is done on every rank; how many steps, and for how many seconds the slowest
        loop waited.
        """
        blocked, steps = 0.0, 0

        def waiting(act: Callable[[], object]) -> None:
            nonlocal blocked
            begin = time.perf_counter()
            act()
            blocked += time.perf_counter() - begin

        path = checkpoint.latest(saver.folder)
        waiting(lambda: saver.save(number))
        while not self.step(checkpoint.latest(saver.folder) != path, lambda: waiting(saver.before_update)):
            steps += 1
        waiting(saver.finish)
        slowest = all_reduce_(
            torch.tensor(blocked, dtype=torch.float64), self.run.mesh.world, dist.ReduceOp.MAX
        )
        return steps + 1, float(slowest)


def _dd(source: Path, target: Path) -> None:
    """Copy the checkpoint's files of tensors with dd, each flushed to the disk."""
    for file in sorted(source.glob("*.distcp")):
        command = ["dd", f"if={file}", f"of={target}-{file.name}", "bs=1M", "conv=fsync", "status=none"]
        subprocess.run(command, check=True)


def summarise(rounds: list[dict[str, float]], options: Options) -> dict[str, Any]:
    """Medians over the rounds; ratios are taken round by round."""
    return {
        "nproc": options.nproc,
        "bytes": rounds[0]["bytes"],
        "seconds": {
            name: median(r[name] for r in rounds) for name in (*STEPS, "blocked") if name in rounds[0]
        },
        "times_dd": {name: median(r["dd"] / r[name] for r in rounds) for name in STEPS if name in rounds[0]},
        "blocked_share": median(r["blocked"] / r["background save"] for r in rounds),
        "steps": median(r["steps"] for r in rounds),
    }


def render(result: dict[str, Any]) -> str:
    """The result as a markdown table."""
    size = result["bytes"]
    lines = [
        f"{result['nproc']} rank(s), {size / 1e9:.2f} GB; the background save beside {result['steps']:.0f} "
        f"training steps, blocked {1000 * result['seconds']['blocked']:.0f} ms = "
        f"{result['blocked_share']:.1%} of it",
        "",
        "| | seconds | GB/s | times dd |",
        "|---|--:|--:|--:|",
    ]
    for name in result["times_dd"]:
        seconds = result["seconds"][name]
        lines.append(
            f"| {name} | {seconds:.2f} | {size / seconds / 1e9:.2f} | {result['times_dd'][name]:.2f} |"
        )
    return "\n".join(lines)


def _settings(options: Options) -> Settings:
    base = load_settings(CONFIG)
    slots = len(base.engram.orders) * base.engram.heads
    layout = ["parallel.ep=1"] if options.nproc == 1 else []
    size = [f"engram.rows_per_head={-(-options.rows // slots)}", "parallel.mem=-1"]
    return load_settings(CONFIG, [*size, *layout, *options.overrides])


def _parse(argv: list[str] | None) -> tuple[Options, bool]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="section.key=value on top of the quickstart's settings")
    parser.add_argument(
        "--rows", type=int, default=8_000_000, help="of the packed table; 136 bytes each with their state"
    )
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up")
    parser.add_argument("--nproc", type=int, default=1, help="ranks; the table is sharded over all of them")
    parser.add_argument("--dir", default=None, help="where to write; the disk that is measured")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    if min(args.rows, args.rounds, args.nproc) < 1:
        parser.error("--rows, --rounds and --nproc must be at least 1")
    return Options(args.rows, args.rounds, args.nproc, args.dir or "", "", tuple(args.overrides)), args.json


if __name__ == "__main__":
    main()
