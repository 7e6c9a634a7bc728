"""`hybridtrain kernels bench`: every kernel on this machine's GPU against its reference, torch.compile and
installed libraries.

Forward and backward together, where there is one. An op that is off, here or at a small odd shape, shows its
error and no time. Not yet run on a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hybridtrain.kernels.report.contests import Candidate, Contest, contests

Row = dict[str, Any]
Seconds = Callable[[Callable[[], Any]], float]  # of one call
ODD = (257, 100)  # tokens and width of the shapes at which an op must be right as well
WORTH_SAYING = 80  # characters of an error


def requirements() -> list[str]:
    """What stands against measuring here, in words."""
    if not torch.cuda.is_available():
        return ["kernels bench needs a CUDA device, and torch finds none here"]
    return (
        []
        if importlib.util.find_spec("triton")
        else ["kernels bench needs the package triton: pip install triton"]
    )


def errors(contest: Contest, candidate: Candidate) -> float:
    """Greatest error of outputs and gradients against the reference in float32, in units of the greatest
    element.

    Infinite where integers differ, or an element that should be finite is not.
    """
    worst = 0.0
    wanted = _prepare(contest, contest.reference, [_wide(t) for t in contest.inputs])()
    for mine, exact in zip(_prepare(contest, candidate, contest.inputs)(), wanted, strict=True):
        if not exact.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(mine, exact) else float("inf"))
        elif exact.numel():
            error = float((mine.float() - exact).abs().max() / exact.abs().max().clamp_min(1e-20))
            worst = max(worst, error if error == error else float("inf"))
    return worst


def wrong(device: str, N: int, D: int) -> dict[tuple[str, str], float]:
    """Errors of the kernels that are off, by op and shape."""
    found = {(c.op, c.shape): (errors(c, c.fused), c.error) for c in contests(device, N, D)}
    return {key: error for key, (error, allowed) in found.items() if error > allowed}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _prepare(contest: Contest, candidate: Candidate, inputs: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """A call of forward and backward, on copies of the inputs; what they need is made here and, once, in the
    first call.
    """
    own = [t.detach().clone().requires_grad_(contest.trains and t.is_floating_point()) for t in inputs]
    leaves = [t for t in own if t.requires_grad]
    cotangents: list[Tensor] = []

    def call() -> list[Tensor]:
        outputs = candidate(*own)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        with_gradient = [o for o in outputs if o.requires_grad]
        if not cotangents:
            generator = torch.Generator().manual_seed(0)
            cotangents.extend(
                torch.randn(o.shape, generator=generator, device="cpu").to(o) for o in with_gradient
            )
        gradients = torch.autograd.grad(with_gradient, leaves, cotangents) if with_gradient else ()
        return [*(o.detach() for o in outputs), *gradients]

    return call


def bench(
    device: str = "cuda", size: tuple[int, int] = (16384, 4096), seconds: Seconds | None = None
) -> list[Row]:
    """One row per op and candidate: seconds of forward and backward, GB/s or TFLOP/s, share of the device's
    measured peak.

    `size` is tokens and model width. `seconds` measures one call; None: triton's do_bench, median.
    """
    if seconds is None:
        from triton.testing import do_bench

        def seconds(call: Callable[[], Any]) -> float:
            return float(do_bench(call, return_mode="median")) / 1e3

    failing = {op for op, _ in wrong(device, *ODD)}
    bandwidth, products = _peaks(device, size[1], seconds)
    rows: list[Row] = []
    for contest in contests(device, *size):
        candidates = {"torch": contest.reference, "triton": contest.fused, **contest.others}
        candidates["torch.compile"] = torch.compile(contest.reference)
        base = None
        for name, candidate in candidates.items():
            row = _judge(contest, name, candidate)
            if row["right"]:
                took = seconds(_prepare(contest, candidate, contest.inputs))
                base = took if name == "torch" else base
                rate = contest.flops / took if contest.flops else contest.moved / took
                row |= {"seconds": took, "rate": rate, "unit": "FLOP/s" if contest.flops else "B/s"}
                row |= {
                    "peak_share": rate / (products if contest.flops else bandwidth),
                    "speed_up": base / took if base else None,
                }
            rows.append(row)
    failing |= {row["op"] for row in rows if row["candidate"] == "triton" and not row["right"]}
    return [_withdrawn(row) if row["candidate"] == "triton" and row["op"] in failing else row for row in rows]


def _judge(contest: Contest, name: str, candidate: Candidate) -> Row:
    """The row of a candidate before it is timed; `why` says what is wrong with it."""
    row: Row = {"op": contest.op, "shape": contest.shape, "candidate": name, "error": None, "why": ""}
    try:
        row["error"] = errors(contest, candidate)
        if row["error"] > contest.error:
            row["why"] = f"wrong: error {row['error']:.2g}"
    except (
        Exception
    ) as error:  # a library of another version, a compiler: the others are measured all the same
        row["why"] = f"fails: {type(error).__name__}: {error}".partition("\n")[0][:WORTH_SAYING]
    return row | {"right": not row["why"]}


def _withdrawn(row: Row) -> Row:
    """The row of a kernel that is right here and wrong at another shape, without its time."""
    timed = ("seconds", "rate", "unit", "peak_share", "speed_up")
    return {key: value for key, value in row.items() if key not in timed} | {
        "why": row["why"] or "wrong at another shape",
        "right": False,
    }


def _peaks(device: str, side: int, seconds: Seconds) -> tuple[float, float]:
    """(bytes per second of a copy, bf16 FLOP/s of a product of `side` twice) of this device, measured."""
    flat = torch.empty(32 * side**2, dtype=torch.uint8, device=device)
    other, a = torch.empty_like(flat), torch.randn(2 * side, 2 * side, device=device).bfloat16()
    return 2 * flat.numel() / seconds(lambda: other.copy_(flat)), 2 * (2 * side) ** 3 / seconds(lambda: a @ a)


def show(rows: Sequence[Row]) -> str:
    """The rows as a markdown table; an op that is wrong shows its error alone."""
    lines = [
        "| op | shape | by | forward + backward | rate | of the peak | against torch |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        head = f"| {row['op']} | {row['shape']} | {row['candidate']} |"
        if not row["right"]:
            lines.append(f"{head} {row['why']} | | | |")
            continue
        speed_up = "" if row["speed_up"] is None else f"{row['speed_up']:.2f}"
        took, rate = f"{row['seconds'] * 1e3:.3f} ms", f"{row['rate'] / 1e12:.2f} T{row['unit']}"
        lines.append(f"{head} {took} | {rate} | {row['peak_share']:.0%} | {speed_up} |")
    return "\n".join(lines)
