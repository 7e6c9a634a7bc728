"""`hybridtrain kernels bench`: every kernel on this machine's GPU against its reference, torch.compile and installed libraries.

Forward and backward together. An op whose output or gradients are off shows its error and no time. Not yet run on a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]
BFLOAT16_ERROR = 2.0**-6  # of the greatest element: a few roundings of bfloat16 inputs and outputs


@dataclass(frozen=True)
class Contest:
    """One op at one shape: `fused` and `reference` take `inputs`, of which the floating-point ones get gradients.

    moved: bytes that forward and backward must move; flops: of the products of both.
    """

    op: str
    shape: str
    inputs: tuple[Tensor, ...]
    fused: Callable[..., Any]
    reference: Callable[..., Any]
    moved: int
    flops: int = 0
    others: dict[str, Callable[..., Any]] = field(default_factory=dict)


def requirements() -> list[str]:
    """What stands against measuring here, in words."""
    if not torch.cuda.is_available():
        return ["kernels bench needs a CUDA device, and torch finds none here"]
    return [] if importlib.util.find_spec("triton") else ["kernels bench needs the package triton: pip install triton"]


def contests(device: str, scale: int = 1) -> Iterator[Contest]:
    """The ops with gradients, at production shapes divided by `scale`."""

    def parts(op: str) -> tuple[Any, Any]:
        kernel, reference = (importlib.import_module(f"hybridtrain.kernels.{op}.{name}") for name in ("kernel", "reference"))
        return kernel, reference

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16()

    N, D = 16384 // scale, 4096 // scale
    size = 2 * N * D
    x, weight = normal(N, D), normal(D)
    fused: Callable[..., Any]
    plain: Callable[..., Any]
    kernel, reference = parts("rms_norm")
    others: dict[str, Callable[..., Any]] = {"torch fused": lambda x, w: torch.nn.functional.rms_norm(x, w.shape, w, 1e-6)}
    if importlib.util.find_spec("liger_kernel"):
        others["liger"] = lambda x, w: importlib.import_module("liger_kernel.transformers.functional").liger_rms_norm(
            x, w, 1e-6, in_place=False
        )
    if importlib.util.find_spec("apex"):
        others["apex"] = lambda x, w: importlib.import_module("apex.normalization.fused_layer_norm").fused_rms_norm_affine(
            x, w, w.shape, 1e-6
        )
    fused, plain = (lambda x, w, f=f: f(x, w, 1e-6) for f in (kernel.rms_norm, reference.rms_norm))
    yield Contest("rms_norm", f"N={N} D={D}", (x, weight), fused, plain, 5 * size, 0, others)

    kernel, reference = parts("swiglu")
    others = {}
    if importlib.util.find_spec("liger_kernel"):
        others["liger"] = lambda g, u: importlib.import_module("liger_kernel.transformers.functional").liger_swiglu(g, u)
    yield Contest("swiglu", f"N={N} F={D}", (x, normal(N, D)), kernel.swiglu, reference.swiglu, 8 * size, 0, others)

    kernel, reference = parts("rope")
    turn = torch.randn(N // 4, 128, device=device)
    heads = normal(4, N // 4, max(1, D // 128), 128)
    fused, plain = (lambda x, f=f: f(x, turn, None, 1e-6) for f in (kernel.rope, reference.rope))
    yield Contest("rope", f"N={N} C=128", (heads,), fused, plain, 4 * 2 * heads.numel())

    kernel, reference = parts("engram_gate")
    gate = (normal(N, 1, D), normal(N, 1, D), normal(N, D), normal(1, D), normal(1, D))
    fused, plain = (lambda *t, f=f: f(*t, 1e-6, 0.01)[0] for f in (kernel.engram_gate, reference.engram_gate))
    yield Contest("engram_gate", f"N={N} D={D}", gate, fused, plain, 11 * size)

    kernel, reference = parts("cross_entropy")
    targets = torch.randint(0, 8 * D, (N // 4,), device=device)
    fused, plain = (lambda x, f=f: f(x, targets, -1) for f in (kernel.cross_entropy_sum, reference.cross_entropy_sum))
    logits = normal(N // 4, 8 * D)
    yield Contest("cross_entropy", f"N={N // 4} V={8 * D}", (logits,), fused, plain, 3 * 2 * logits.numel())

    kernel, reference = parts("grouped_mlp")
    E, F = 16, D // 2
    counts = torch.full((E,), N // E, device=device)
    weights = (normal(E, D, F), normal(E, D, F), normal(E, F, D))
    scaled = tuple(w / D**0.5 for w in weights)
    fused, plain = (lambda x, *w, f=f: f(x, counts, *w) for f in (kernel.grouped_swiglu, reference.grouped_swiglu))
    moved = 3 * (2 * size + 2 * sum(w.numel() for w in weights))
    yield Contest("grouped_mlp", f"P={N} E={E} D={D} F={F}", (x, *scaled), fused, plain, moved, 18 * N * D * F)


def errors(contest: Contest, candidate: Callable[..., Any]) -> float:
    """Greatest error of the output and the gradients against the reference in float32, in units of the greatest element."""
    worst = 0.0
    wanted = _results(contest.reference, [t.float() for t in contest.inputs])
    for mine, exact in zip(_results(candidate, contest.inputs), wanted, strict=True):
        worst = max(worst, float((mine.float() - exact).abs().max() / exact.abs().max().clamp_min(1e-20)))
    return worst


def _results(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    return _prepare(function, inputs)()


def _prepare(function: Callable[..., Any], inputs: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """A call of forward and backward alone; what they need is made here."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    shape = function(*leaves).shape
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(leaves[0])

    def call() -> list[Tensor]:
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    return call


def bench(device: str = "cuda", scale: int = 1, seconds: Callable[[Callable[[], Any]], float] | None = None) -> list[Row]:
    """One row per op and candidate: seconds of forward and backward, GB/s or TFLOP/s, share of the device's measured peak.

    `seconds` measures one call; None: triton's do_bench, median.
    """
    if seconds is None:
        from triton.testing import do_bench

        def seconds(call: Callable[[], Any]) -> float:
            return float(do_bench(call, return_mode="median")) / 1e3

    bandwidth, products = _peaks(device, scale, seconds)
    rows: list[Row] = []
    for contest in contests(device, scale):
        candidates = {"torch": contest.reference, "triton": contest.fused, **contest.others}
        candidates["torch.compile"] = torch.compile(contest.reference)
        base = None
        for name, candidate in candidates.items():
            error = errors(contest, candidate)
            row: Row = {"op": contest.op, "shape": contest.shape, "candidate": name, "error": error}
            row["right"] = error < BFLOAT16_ERROR
            if row["right"]:
                took = seconds(_prepare(candidate, contest.inputs))
                base = took if name == "torch" else base
                rate = contest.flops / took if contest.flops else contest.moved / took
                row |= {"seconds": took, "rate": rate, "unit": "FLOP/s" if contest.flops else "B/s"}
                row |= {"peak_share": rate / (products if contest.flops else bandwidth), "speed_up": base / took if base else None}
            rows.append(row)
    return rows


def _peaks(device: str, scale: int, seconds: Callable[[Callable[[], Any]], float]) -> tuple[float, float]:
    """(bytes per second of a copy, bf16 FLOP/s of a product) of this device, measured."""
    flat = torch.empty((1 << 29) // scale**2, dtype=torch.uint8, device=device)
    other, side = torch.empty_like(flat), 8192 // scale
    a = torch.randn(side, side, device=device).bfloat16()
    return 2 * flat.numel() / seconds(lambda: other.copy_(flat)), 2 * side**3 / seconds(lambda: a @ a)


def show(rows: Sequence[Row]) -> str:
    """The rows as a markdown table; an op that is wrong shows its error alone."""
    lines = ["| op | shape | by | forward + backward | rate | of the peak | against torch |", "|---|---|---|--:|--:|--:|--:|"]
    for row in rows:
        head = f"| {row['op']} | {row['shape']} | {row['candidate']} |"
        if not row["right"]:
            lines.append(f"{head} wrong: error {row['error']:.2g} | | | |")
            continue
        speed_up = "" if row["speed_up"] is None else f"{row['speed_up']:.2f}"
        took, rate = f"{row['seconds'] * 1e3:.3f} ms", f"{row['rate'] / 1e12:.2f} T{row['unit']}"
        lines.append(f"{head} {took} | {rate} | {row['peak_share']:.0%} | {speed_up} |")
    return "\n".join(lines)
