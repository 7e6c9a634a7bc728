"""hybridtrain beside transformers and DeepSpeed on the same MoE language model: `python -m tools.bench_peers
[--cases small many large hybrid] [--ranks 1 2]`

Every subject (tools/peers.py) lives in processes of its own and is told in turns to run some steps, so that
other work on the machine hits all alike. Printed per case: its shapes, the machine, tokens a second, the
ratio of each peer's seconds to hybridtrain's round by round (median and quartiles), peak memory over all
ranks, and the share of the peak of a large matrix product, measured in the same rounds. Needs the extra
`bench`.

The case `hybrid` has Engram layers and a lookup table: in hybridtrain its own, cut over the ranks, in the
peers an `nn.Embedding` with the optimizer of the rest. The peer `hybridtrain:independent` is as many
processes as there are ranks, each training its share of the batch by itself, at the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from hybridtrain.launch.cores import let_openmp_sleep, shares_of_cores, usable_cores
from hybridtrain.model.cost import flops_per_token
from tools.peer_cases import CASES, Case
from tools.peers import MATMUL_FLOPS, to_json

OURS = "hybridtrain"
SHAPES = [field.name for field in fields(Case) if field.name not in ("ranks", "threads")]
Round = dict[str, list[dict[str, float]]]  # of each subject, every rank's answer


class Subject:
    """The processes of one subject, one a rank."""

    def __init__(self, name: str, case: Case, folder: Path) -> None:
        self.name = name
        self.log = folder / f"{name.replace(':', '-')}.log"
        store = tempfile.mktemp(dir=folder)
        self.ranks = [self._start(case, rank, store) for rank in range(case.ranks)]
        shares = shares_of_cores(usable_cores(), case.ranks, case.threads)
        for process, cores in zip(self.ranks, shares, strict=True):
            if cores:
                os.sched_setaffinity(
                    process.pid, cores
                )  # before it has threads, as `hybridtrain launch` does

    def _start(self, case: Case, rank: int, store: str) -> subprocess.Popen[str]:
        root = Path(__file__).parent.parent
        port = str(20000 + (os.getpid() * 7 + sum(map(ord, self.name))) % 20000)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": str(case.threads),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(case.ranks),
            "LOCAL_WORLD_SIZE": str(case.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        if self.name.startswith(OURS):
            let_openmp_sleep(environment)  # as the command does
        with self.log.open("a") as log:
            return subprocess.Popen(
                [sys.executable, str(root / "tools" / "peers.py"), self.name, to_json(case)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )

    def answer(self) -> list[str]:
        """One line of every rank. Raises RuntimeError with the end of the log where one died."""
        lines = [rank.stdout.readline() for rank in self.ranks if rank.stdout is not None]
        if not all(lines):
            raise RuntimeError(f"{self.name} died:\n" + "\n".join(self.log.read_text().splitlines()[-15:]))
        return lines

    def run(self, steps: int) -> list[dict[str, float]]:
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.write(f"{steps}\n")
            rank.stdin.flush()
        return [json.loads(line) for line in self.answer()]

    def close(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.communicate()


def measure(case: Case, names: list[str], rounds: int, steps: int, warmup: int) -> list[Round]:
    """All subjects in turns, forwards and backwards, `steps` steps each a round. RuntimeError: the models
    differ in size.
    """
    subjects: list[Subject] = []
    parameters: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as folder:
        try:
            for name in names:
                subjects.append(Subject(name, case, Path(folder)))
                size = json.loads(
                    subjects[-1].answer()[0]
                )  # one after the other: each starts with the machine to itself
                parameters |= {} if size is None else {name: size}
            if len(set(parameters.values())) > 1:
                raise RuntimeError(f"not the same model: {parameters} parameters")
            out = []
            for number in range(warmup + rounds):
                order = subjects if number % 2 == 0 else subjects[::-1]
                answers = {subject.name: subject.run(steps) for subject in order}
                out.append({name: answers[name] for name in names})
            return out[warmup:]
        finally:
            for subject in subjects:
                subject.close()


def summarise(case: Case, rounds: list[Round], steps: int) -> dict[str, Any]:
    """Per subject: tokens/s, ratio to hybridtrain by the clock and by CPU time, peak memory, share of the
    matmul peak.
    """
    tokens = case.batch * case.seq_len
    flops = flops_per_token(case.settings(), case.vocab) * tokens
    peaks = [case.ranks * steps * MATMUL_FLOPS / _seconds(r["matmul"]) for r in rounds]
    out: dict[str, Any] = {}
    for name in rounds[0]:
        if name == "matmul":
            continue
        seconds = [_seconds(r[name]) / steps for r in rounds]
        out[name] = {
            "tokens_per_second": _spread([tokens / s for s in seconds]),
            "ratio": _spread([_seconds(r[name]) / _seconds(r[OURS]) for r in rounds]),
            "cpu_ratio": _spread(
                [sum(a["cpu"] for a in r[name]) / sum(a["cpu"] for a in r[OURS]) for r in rounds]
            ),
            "share_of_peak": _spread([flops / s / p for s, p in zip(seconds, peaks, strict=True)]),
            "peak_bytes": sum(answer["bytes"] for answer in rounds[-1][name]),
        }
    return {
        "case": asdict(case),
        "machine": describe_machine(),
        "rounds": len(rounds),
        "steps": steps,
        "peak_flops": _spread(peaks),
        "subjects": out,
    }


def describe_machine() -> dict[str, Any]:
    """What the figures depend on beside the code."""
    cpu, path = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            cpu = value.strip()
            break
    return {
        "cpu": cpu,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(usable_cores()),
        "torch": torch.__version__,
    }


def _seconds(answers: list[dict[str, float]]) -> float:
    return max(answer["seconds"] for answer in answers)


def _spread(values: list[float]) -> list[float]:
    """[median, lower quartile, upper quartile]"""
    low, _, high = quantiles(values, n=4, method="inclusive")
    return [median(values), low, high]


def render(result: dict[str, Any]) -> str:
    """One case as a markdown table."""
    case, machine = Case(**result["case"]), result["machine"]
    low, middle, high = (value / 1e9 for value in sorted(result["peak_flops"]))
    table = f", table {case.rows:,} x {case.row_width}" if case.rows else ""
    lines = [
        f"{case.experts} experts, top {case.top_k}, width {case.hidden}{table}; dim {case.dim}, "
        f"{case.layers} layers, {case.heads} heads, {case.seq_len} tokens, batch {case.batch}, "
        f"vocabulary {case.vocab:,}",
        "",
        f"{case.ranks} rank(s) x {case.threads} thread(s), {result['rounds']} rounds of {result['steps']} "
        f"steps; {machine['cpu']} ({machine['instructions']}), {machine['cores']} cores, torch "
        f"{machine['torch']}; matmul peak {middle:.0f} ({low:.0f}-{high:.0f}) GFLOP/s",
        "",
        "| | tokens/s | seconds / hybridtrain's | by CPU time | share of matmul peak | peak memory, MB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, s in result["subjects"].items():
        cells = [f"{s['tokens_per_second'][0]:,.0f}"]
        cells += [
            f"{m:.2f} ({low:.2f}-{high:.2f})"
            for m, low, high in (s["ratio"], s["cpu_ratio"], s["share_of_peak"])
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {s['peak_bytes'] / 1e6:,.0f} |")
    return "\n".join(lines)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=CASES,
        default=["small", "many"],
        metavar="CASE",
        help=f"of {', '.join(CASES)} (tools/peer_cases.py)",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[1],
        help="numbers of ranks; the threads are shared out among them",
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of all ranks together")
    parser.add_argument(
        "--peers",
        nargs="+",
        default=["transformers:grouped_mm", "deepspeed"],
        help="also transformers:eager, :batched_mm, :fsdp2, hybridtrain:zero0, :zero3, :replicated, "
        ":independent",
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2, help="steps of a round")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before")
    shapes = parser.add_argument_group("shapes", "in place of the cases' own")
    for name in SHAPES:
        shapes.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args(argv)
    if args.rounds < 2 or args.steps < 1 or args.warmup < 0:
        parser.error("--rounds must be at least 2, --steps at least 1, --warmup at least 0")
    return args


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    shapes = {name: value for name in SHAPES if (value := getattr(args, name)) is not None}
    names = [OURS, *args.peers, "products", "matmul"]
    for ranks in args.ranks:
        for name in args.cases:
            case = replace(CASES[name], **shapes, ranks=ranks, threads=max(1, args.threads // ranks))
            result = summarise(case, measure(case, names, args.rounds, args.steps, args.warmup), args.steps)
            print(json.dumps(result, indent=1) if args.json else render(result) + "\n", flush=True)


if __name__ == "__main__":
    main()
