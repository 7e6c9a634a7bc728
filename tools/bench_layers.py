"""What do recomputation, compilation and bfloat16 cost and save? `python tools/bench_layers.py CONFIG
[section.key=value …]`

Trains one rank on the same batches once per case, in turns (A B C A B C …), and prints for each the bytes of
tensors that were made and lived at the same time in a step, at most, and the ratio of its time to the first
case's, pair by pair.
"""

from __future__ import annotations

import argparse
import json
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hybridtrain.data.batches import BatchLoader, BatchShare
from hybridtrain.data.prepare import ensure_prepared
from hybridtrain.data.shards import TokenDataset
from hybridtrain.monitor.clock import Clock
from hybridtrain.run.assemble import Run, Vocabulary, assemble, make_addressing
from hybridtrain.run.process_setup import join_world
from hybridtrain.run.step import Hooks, StepInput, train_step
from hybridtrain.settings.load import load_settings

CASES = {
    "plain": (),
    "selective": ("train.recompute=selective",),
    "full": ("train.recompute=full",),
    "compile": ("train.compile=true",),
    "compile-full": ("train.compile=true", "train.recompute=full"),
    "bfloat16": ("train.precision=bfloat16",),
}


class PeakBytes(TorchDispatchMode):
    """The most bytes, at one time, of the tensors that operations made while this is on; exact, whatever the
    allocator does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in [a for a in args if isinstance(a, Tensor)]:
            self._known.add(
                tensor.untyped_storage()
            )  # it was there before: outputs that share it are not new
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["plain", "selective", "full"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_intermixed_args(argv)
    steps: dict[str, Callable[[int], None]] = {}
    for case in options.cases:
        steps[case] = _case(options.config, [*options.overrides, *CASES[case]])
    result = measure(steps, options.steps, options.warmup)
    print(json.dumps(result, indent=1) if options.json else render(result))


def measure(steps: dict[str, Callable[[int], None]], count: int, warmup: int) -> dict[str, dict[str, Any]]:
    """Bytes and seconds (median), and the median and quartiles of the ratio to the first case by CPU time and
    by the clock.
    """
    wall: dict[str, list[float]] = {case: [] for case in steps}
    cpu: dict[str, list[float]] = {case: [] for case in steps}
    for number in range(warmup + count):
        for case in (
            list(steps) if number % 2 == 0 else list(steps)[::-1]
        ):  # none always comes after the same one
            begin, cpu_begin = time.perf_counter(), time.process_time()
            steps[case](number)
            if number >= warmup:
                wall[case].append(time.perf_counter() - begin)
                cpu[case].append(time.process_time() - cpu_begin)
    out = {}
    first = next(iter(steps))
    for case, step in steps.items():
        with PeakBytes() as bytes_of_step:
            step(warmup + count)
        ratios = {"ratio": _ratio(wall[case], wall[first]), "cpu_ratio": _ratio(cpu[case], cpu[first])}
        out[case] = {"peak_bytes": bytes_of_step.peak, "seconds": median(wall[case]), **ratios}
    return out


def render(result: dict[str, dict[str, Any]]) -> str:
    first = next(iter(result.values()))["peak_bytes"]
    lines = [
        "| case | MB at most | of the first | ms a step | ratio by the clock | by CPU time |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for case, r in result.items():
        ratios = " | ".join("{:.2f} ({:.2f}-{:.2f})".format(*r[key]) for key in ("ratio", "cpu_ratio"))
        mb = r["peak_bytes"] / 1e6
        lines.append(
            f"| {case} | {mb:.1f} | {r['peak_bytes'] / first:.2f} | {r['seconds'] * 1e3:.0f} | {ratios} |"
        )
    return "\n".join(lines)


def _case(config: Path, overrides: list[str]) -> Callable[[int], None]:
    settings = load_settings(config, ["parallel.ep=1", "parallel.mem=1", *overrides])
    ensure_prepared(settings.data)
    dataset, mesh = TokenDataset.open(settings.data.path, verify=False), join_world(settings)
    vocabulary = Vocabulary.of(dataset)
    run: Run = assemble(settings, mesh, vocabulary, make_addressing(settings, vocabulary))
    train, clock = settings.train, Clock(mesh.device)
    share = BatchShare(train.global_batch, train.micro_batches)
    loader = BatchLoader(dataset.split("train"), train.seq_len, share, settings.run.seed)

    def step(number: int) -> None:
        batch = loader.load(number)
        plan = run.table.plan(batch) if run.table is not None else None
        train_step(run, number, StepInput(batch, plan), Hooks(clock.phase))

    return step


def _ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return median(ratios), low, high


if __name__ == "__main__":
    main()
