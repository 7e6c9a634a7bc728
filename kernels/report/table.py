"""The report: every op at its production shapes, compiled for every target, as rows and as markdown."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from hybridtrain.kernels.launch import Case, Launch, recording
from hybridtrain.kernels.ops import OPS, TRITON_OPS
from hybridtrain.kernels.report.hardware import TARGETS

Row = dict[str, Any]
FOLDER = Path(__file__).parents[1]


def report(ops: Sequence[str] = TRITON_OPS, targets: Sequence[str] = tuple(TARGETS)) -> list[Row]:
    """One row per launch and target, in the order of ops, cases, launches, targets."""
    jobs = []
    for op in ops:
        for number, (case, _, _) in enumerate(_launches(op)):
            jobs += [(op, number, target) for target in targets if target in (case.targets or targets)]
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(_row, jobs, chunksize=4))


def _launches(op: str) -> Iterator[tuple[Case, Launch, int]]:
    """Every launch of the op's cases, with the bytes of all launches of its case."""
    for source in OPS[op].sources:
        for case in importlib.import_module(f"hybridtrain.kernels.{source}").cases():
            with recording() as launches:
                case.run()
            moved = sum(launch.traffic for launch in launches)
            for launch in launches:
                yield case, launch, moved


def _row(job: tuple[str, int, str]) -> Row:
    from hybridtrain.kernels.report.compile import compile_launch

    op, number, name = job
    case, launch, moved = list(_launches(op))[number]
    target = TARGETS[name]
    machine = compile_launch(launch, target)
    return {
        "op": op,
        "case": case.shape,
        "kernel": launch.kernel.__name__.removeprefix("_").removesuffix("_kernel"),
        "target": name,
        "config": config(launch),
        "bound": case.bound,
        **vars(machine),
        "occupancy": round(target.occupancy(machine.registers, machine.shared_bytes, launch.num_warps), 3),
        "bytes_moved": launch.traffic,
        "case_bytes_moved": moved,
        "case_bytes_minimum": case.minimum,
        "flops": case.flops,
        "roofline_us": round(target.seconds(moved, case.flops, case.bits) * 1e6, 1),
    }


def config(launch: Launch) -> str:
    """The tuned constants in words: "BLOCK_N=1 BLOCK_D=4096, 8 warps, 2 stages"."""
    constants = " ".join(f"{k}={int(v) if isinstance(v, bool) else v}" for k, v in launch.constants.items())
    return f"{constants}, {launch.num_warps} warps, {launch.num_stages} stages"


def digest() -> str:
    """SHA-256 over what decides the rows: the kernels, the launching and the reading of them."""
    reading = [FOLDER / "report" / name for name in ("compile.py", "hardware.py", "table.py")]
    kernels = [file for file in FOLDER.glob("*/*.py") if b"@triton.jit" in file.read_bytes()]
    files = sorted([*kernels, *reading, FOLDER / "launch.py"])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def markdown(rows: Sequence[Row]) -> str:
    """The tables of docs/kernels.md: the cases with their roofline, then every kernel by target."""
    devices = [target.device for target in TARGETS.values()]
    lines = ["| op | case | bytes moved | of the minimum | " + " | ".join(f"{d} µs" for d in devices) + " |"]
    lines += ["|---|---|" + "--:|" * (2 + len(devices))]
    for key in dict.fromkeys((row["op"], row["case"]) for row in rows):
        own = [row for row in rows if (row["op"], row["case"]) == key]
        times = [
            str(next((row["roofline_us"] for row in own if row["target"] == name), "")) for name in TARGETS
        ]
        moved, least = own[0]["case_bytes_moved"], own[0]["case_bytes_minimum"]
        lines.append(
            f"| {key[0]} | {key[1]} | {moved / 1e6:.1f} MB | {moved / least:.2f} | {' | '.join(times)} |"
        )
    cells = (
        "registers",
        "spill_bytes",
        "shared_bytes",
        "occupancy",
        "load_bits",
        "store_bits",
        "wide_share",
        "tensor_core",
    )
    lines += [
        "",
        "| op: kernel, case, config | target | registers | spilled | shared | occupancy | load | store | "
        "wide | matrix |",
    ]
    lines += ["|---|---|" + "--:|" * len(cells)]
    for row in rows:
        name = f"{row['op']}: {row['kernel']}, {row['case']}, {row['config']}"
        lines.append(f"| {name} | {row['target']} | {' | '.join(str(row[c]) for c in cells)} |")
    return "\n".join(lines) + "\n"


def to_json(rows: Sequence[Row]) -> str:
    """The rows with the digest of what they were made of."""
    return json.dumps({"digest": digest(), "rows": list(rows)}, indent=0)
