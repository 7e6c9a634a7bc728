"""What of a run grows with ranks, tokens, experts or steps, measured on one core:
`python tools/bench_growth.py [--small]`

Prints one line for each: what was done, how large, seconds (the least of a few), and the bytes that the
process grew by, or that were written. docs/scaling.md has the laws. With `--small` sizes are tiny, to see
that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hybridtrain.files.durable import FileRecord
from hybridtrain.kernels.document_attention import reference
from hybridtrain.kernels.document_attention.op import document_attention, read_spans
from hybridtrain.kernels.permute.op import sort_by_destination
from hybridtrain.model.init import draw
from hybridtrain.monitor.metrics import METRICS, MetricsLog
from hybridtrain.monitor.stragglers import slowest
from hybridtrain.parallel.layout import Layout

Line = tuple[str, float, int]  # what, seconds, bytes


def in_a_child(act: Callable[[], object]) -> tuple[float, int]:
    """Seconds that `act` took in a process of its own, and the bytes by which its greatest resident size
    grew.
    """
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # forgets the peak of the process that it was forked from
        before, begin = _peak_kib(), time.perf_counter()
        act()
        os.write(writing, json.dumps([time.perf_counter() - begin, 1024 * (_peak_kib() - before)]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    if not text:
        raise RuntimeError("the measured process ended before it was done, perhaps for want of memory")
    seconds, grown = json.loads(text)
    return seconds, grown


def _peak_kib() -> int:
    """The greatest resident size of this process so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def least(act: Callable[[], object], times: int = 5) -> float:
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def initial_values(rows: int, columns: int) -> Iterator[Line]:
    def of(share: str, *part: Any) -> Line:
        seconds, grown = in_a_child(lambda: draw("w", (rows, columns), 0, 0.02, *part))
        return f"{share} of {rows} x {columns} initial values", seconds, grown

    yield of("all")
    yield of("an eighth of the rows", slice(0, rows // 8))
    yield of("an eighth of the columns", slice(0, rows), (slice(0, columns // 8),))
    yield of("a thousandth of the rows", slice(0, -(-rows // 1000)))


def attention(tokens: int, masked: int) -> Iterator[Line]:
    """Forward and backward of one head of 64, documents of about 1,000 tokens and one document."""

    def run(length: int, documents: torch.Tensor | None, by_mask: bool) -> None:
        q, k, v = (torch.randn(1, length, 1, 64, requires_grad=True) for _ in range(3))
        spans = read_spans(documents, length)
        out = (
            reference.document_attention(q, k, v, documents)
            if by_mask
            else document_attention(q, k, v, documents, spans)
        )
        out.sum().backward()

    for length in (masked, tokens):
        packed = (torch.arange(length) // 1000)[None]
        yield (
            f"attention by blocks, {length} tokens, documents of 1000",
            *in_a_child(partial(run, length, packed, False)),
        )
        yield (
            f"attention by blocks, {length} tokens, one document",
            *in_a_child(partial(run, length, None, False)),
        )
    packed = (torch.arange(masked) // 1000)[None]
    yield f"attention by a mask of all pairs, {masked} tokens", *in_a_child(lambda: run(masked, packed, True))


def metrics(layers: int, experts: int) -> Iterator[Line]:
    values = {f"layers.{i}/expert_load": [1 / experts] * experts for i in range(layers)}
    with tempfile.TemporaryDirectory() as folder:
        log = MetricsLog(Path(folder), 0, 0, 1)
        seconds = least(lambda: log.write(1, values), 3)
        log.close()
        board = sum(file.stat().st_size for file in (Path(folder) / "tensorboard").iterdir())
        sizes = {"metrics.jsonl": (Path(folder) / METRICS).stat().st_size, "TensorBoard": board}
    for where, size in sizes.items():
        yield f"a line of the loads of {layers} layers of {experts} experts in {where}", seconds, size // 3


def ranks(world: int, tokens: int) -> Iterator[Line]:
    generator = torch.Generator().manual_seed(0)
    experts_NK = torch.rand(tokens, world, generator=generator).topk(min(8, world)).indices
    yield (
        f"{tokens} tokens lined up for {world} ranks",
        least(lambda: sort_by_destination(experts_NK, world, world)),
        0,
    )
    layout = Layout.resolve(world)
    yield f"the groups of an axis of {world} ranks", least(lambda: layout.groups("mem"), 3), 0
    yield f"the slowest of {world} ranks", least(lambda: slowest([1.0] * world, [0] * world), 3), 0
    record = {"__1000_0.distcp": {"size": FileRecord(1 << 40, "0" * 32).size, "xxh3": "0" * 32}}
    size = len(pickle.dumps(([], record)))
    yield f"every rank's record of a save, on each of {world} ranks", 0.0, size * world


def decay_log(steps: int) -> Iterator[Line]:
    log = torch.rand(steps, dtype=torch.float64).cumsum(0).neg().mul(1e-5).tolist()
    yield (
        f"the decay log of {steps} steps in checkpoint.json",
        least(lambda: json.dumps(log, indent=1), 3),
        len(json.dumps(log, indent=1)),
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    small = parser.parse_args(arguments).small
    torch.set_num_threads(1)
    parts = (
        initial_values(*((2048, 1024) if small else (12_800, 8192))),
        attention(*((512, 256) if small else (32_768, 8192))),
        metrics(*((2, 4) if small else (58, 256))),
        ranks(*((8, 64) if small else (1024, 8192))),
        decay_log(10 if small else 100_000),
    )
    for part in parts:
        for what, seconds, size in part:
            print(f"{what:75s} {seconds:9.4f} s {size:15,d} bytes", flush=True)


if __name__ == "__main__":
    main()
