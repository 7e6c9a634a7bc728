"""Does each op take torch's fastest form on the CPU? `python tools/bench_candidates.py [--page .]`

Times forward and backward of every op as a run does it and in other formulations, at the shapes of `configs/quickstart.toml` on
one of its two ranks, in turns (A B C, C A B, …), by the process's CPU time. First it checks that all formulations agree.
With --page the table goes into docs/performance.md of the checkout.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridtrain.kernels.cross_entropy import op as cross_entropy
from hybridtrain.kernels.engram_hash import op as engram_hash
from hybridtrain.kernels.engram_hash import reference as hash_reference
from hybridtrain.kernels.engram_hash.addressing import Addressing
from hybridtrain.kernels.grouped_mlp.op import grouped_swiglu
from hybridtrain.kernels.linear_cross_entropy import op as linear_cross_entropy
from hybridtrain.kernels.moe_swiglu.op import moe_swiglu
from hybridtrain.kernels.permute import op as permute
from hybridtrain.kernels.permute import reference as permute_reference
from hybridtrain.kernels.rms_norm import op as rms_norm
from hybridtrain.kernels.rms_norm import reference as rms_norm_reference
from hybridtrain.kernels.rope import op as rope
from hybridtrain.kernels.rope import reference as rope_reference
from hybridtrain.kernels.segment_sum import op as segment_sum
from hybridtrain.kernels.swiglu import op as swiglu
from hybridtrain.kernels.swiglu import reference as swiglu_reference
from hybridtrain.world import keep_freed_memory

START, END = "<!-- written by tools/bench_candidates.py --page -->", "<!-- end of what is written -->"
PAGE = Path("docs/performance.md")
Form = Callable[..., Any]


@dataclass(frozen=True)
class Race:
    """Formulations of one op over the same inputs; the first is what a run takes. Floating-point inputs that require one get a
    gradient."""

    op: str
    shape: str
    inputs: tuple[Any, ...]
    forms: dict[str, Form]


def races(N: int = 2048, D: int = 128, V: int = 4096) -> Iterator[Race]:
    """Every op of a training step; N tokens of width D, vocabulary V, and the quickstart's other sizes."""
    yield from _norms(N, D)
    yield from _elementwise(N, D)
    yield from _losses(N, D, V)
    yield from _experts(N, D)
    yield from _tokens(N, D)
    yield from _rows(N)


def leaf(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).requires_grad_()


def _norms(N: int, D: int) -> Iterator[Race]:
    forms: dict[str, Form] = {
        "gradient by hand": lambda x, w: rms_norm.rms_norm(x, w, 1e-6),
        "F.rms_norm": lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
        "definition": lambda x, w: rms_norm_reference.rms_norm(x, w, 1e-6),
        "by hand, normed rows kept": lambda x, w: NormKept.apply(x, w, 1e-6),
    }
    yield Race("rms_norm", f"[{N}, {D}]", (leaf(N, D), leaf(D)), forms)
    yield Race("rms_norm", f"[{N}, 4, 32]", (leaf(N, 4, 32), leaf(32)), forms)


def _elementwise(N: int, D: int) -> Iterator[Race]:
    yield Race(
        "swiglu",
        f"[{N}, {3 * D}]",
        (leaf(N, 3 * D), leaf(N, 3 * D)),
        {
            "silu * up": swiglu.swiglu,
            "definition": swiglu_reference.swiglu,
            "gradient by hand": lambda gate, up: SwiGLU.apply(gate, up),
        },
    )
    T = 128
    angles = torch.arange(T)[:, None] * 10_000.0 ** (-torch.arange(0, 32, 2) / 32)
    turn = torch.polar(torch.ones_like(angles), angles)
    real = torch.view_as_real(turn).flatten(1)
    yield Race(
        "rope",
        f"[{N // T}, {T}, 4, 32]",
        (leaf(N // T, T, 4, 32),),
        {
            "complex product": lambda x: rope.rope(x, turn),
            "complex, broadcast": lambda x: torch.view_as_real(
                torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn[:, None]
            ).flatten(-2),
            "definition": lambda x: rope_reference.rope(x, real, None, 0.0),
            "swapped pairs": lambda x: _swapped_pairs(x, turn),
        },
    )


def _swapped_pairs(x: Tensor, turn: Tensor) -> Tensor:
    cos, sin = (part.repeat_interleave(2, -1)[:, None] for part in (turn.real, turn.imag))
    sign = torch.tensor([-1.0, 1.0]).repeat(x.size(-1) // 2)
    return x * cos + x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * (sin * sign)


def _losses(N: int, D: int, V: int) -> Iterator[Race]:
    targets = torch.randint(V, (N,))
    yield Race(
        "cross_entropy",
        f"[{N}, {V}]",
        (leaf(N, V),),
        {
            "one pass in blocks": lambda x: cross_entropy.cross_entropy_sum(x, targets, -100),
            "F.cross_entropy": lambda x: F.cross_entropy(x, targets, reduction="sum"),
            "logsumexp - gather": lambda x: (x.logsumexp(-1) - x.gather(1, targets[:, None])[:, 0]).sum(),
        },
    )
    yield Race(
        "linear_cross_entropy",
        f"[{N}, {D}] x [{V}, {D}]",
        (leaf(N, D), leaf(V, D, scale=D**-0.5)),
        {
            "blocks of tokens": lambda h, w: linear_cross_entropy.linear_cross_entropy_sum(h, w, targets, -100),
            "product, then cross_entropy": lambda h, w: cross_entropy.cross_entropy_sum(F.linear(h, w), targets, -100),
            "F.linear_cross_entropy in chunks": lambda h, w: F.linear_cross_entropy(
                h,
                w,
                targets,
                reduction="sum",
                ignore_index=-100,
                options=torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True),
            ),
            "F.linear, F.cross_entropy": lambda h, w: F.cross_entropy(F.linear(h, w), targets, reduction="sum"),
        },
    )


def _experts(N: int, D: int) -> Iterator[Race]:
    E, K, width = 8, 2, 3 * D // 2
    experts = torch.rand(N, E).topk(K).indices
    weights = leaf(E, D, width, scale=D**-0.5), leaf(E, D, width, scale=D**-0.5), leaf(E, width, D, scale=width**-0.5)

    def grouped(x: Tensor, gates: Tensor, *weights: Tensor) -> Tensor:
        order, inverse, counts = permute.sort_by_expert(experts, E)
        return permute.combine(grouped_swiglu(permute.permute(x, order, inverse), counts, *weights), gates, order, inverse)

    def one_by_one(x: Tensor, gates: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(E):
            token, choice = (experts == e).nonzero(as_tuple=True)
            h = x[token]
            y = swiglu.swiglu(h @ w_gate[e], h @ w_up[e]) @ w_down[e]
            out = out.index_add(0, token, y * gates[token, choice][:, None])
        return out

    yield Race(
        "moe_swiglu",
        f"[{N}, {D}], {E} x {width}, top {K}",
        (leaf(N, D), torch.rand(N, K).requires_grad_(), *weights),
        {
            "expert by expert in cache": lambda x, gates, *w: moe_swiglu(x, experts, gates, *w),
            "grouped_mm": grouped,
            "autograd, expert by expert": one_by_one,
        },
    )


def _tokens(N: int, D: int) -> Iterator[Race]:
    E, K, R = 8, 2, 2
    experts = torch.rand(N, E).topk(K).indices
    yield Race(
        "permute: destinations",
        f"[{N}, {K}], {R} ranks",
        (experts,),
        {
            "table of hits": lambda e: permute.sort_by_destination(e, E, R)[1],
            "stable sort": lambda e: permute_reference.sort_by_destination(e, E, R)[1],
        },
    )
    sent, stands, asked = permute.sort_by_destination(experts, E, R)
    sent = sent[: asked[:, 0].sum()]
    zero = len(sent)
    yield Race(
        "permute: sums back",
        f"[{len(sent)}, {D}] to [{N}, {D}]",
        (leaf(len(sent), D),),
        {
            "index_add": lambda y: permute.collect(y, sent, stands),
            "gathers, a row of zeros": lambda y: sum(
                F.pad(y, (0, 0, 0, 1)).index_select(0, i.where(i >= 0, zero)) for i in stands.T
            ),
            "embedding_bag": lambda y: F.embedding_bag(stands.where(stands >= 0, zero), F.pad(y, (0, 0, 0, 1)), mode="sum"),
        },
    )
    order, inverse, _ = permute.sort_by_expert(experts, E)
    gates = torch.rand(N, K).requires_grad_()
    yield Race(
        "permute: there and back",
        f"[{N}, {D}], top {K}",
        (leaf(N, D), gates),
        {
            "gathers, gradient by hand": lambda x, g: permute.combine(permute.permute(x, order, inverse), g, order, inverse),
            "definition": lambda x, g: permute_reference.combine(permute_reference.permute(x, order, inverse), g, order, inverse),
        },
    )


def _rows(N: int) -> Iterator[Race]:
    C, unique = 32, 7 * N
    values, segment, num = torch.randn(unique, C), torch.randint(6 * N, (unique,)), 6 * N
    column = segment[:, None].expand(-1, C)
    yield Race(
        "segment_sum",
        f"[{unique}, {C}] to [{num}, {C}]",
        (values,),
        {
            "index_add": lambda v: segment_sum.segment_sum(v, segment, num),
            "scatter_add": lambda v: v.new_zeros(num, C).scatter_add_(0, column, v),
            "sort, embedding_bag": lambda v: segment_sum._by_bags(v, segment, num),
        },
    )
    addressing = Addressing.draw([1], [2, 3], 4, 16_384, torch.arange(4096).numpy(), pad_id=0, seed=5)
    tokens, starts = torch.randint(4096, (N // 128, 128)), torch.rand(N // 128, 128) < 0.02
    yield Race(
        "engram_hash",
        f"[{N // 128}, 128], 8 ids a token",
        (tokens, starts),
        {
            "torch": lambda t, s: engram_hash.row_ids(addressing, t, s),
            "definition (numpy)": lambda t, s: torch.from_numpy(hash_reference.row_ids(addressing, t.numpy(), s.numpy())),
        },
    )


class NormKept(torch.autograd.Function):
    """RMSNorm that keeps the normed rows in place of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed = x * scale
        ctx.save_for_backward(normed, weight, scale)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, weight, scale = ctx.saved_tensors
        product = grad * normed
        along = torch.mv(product.flatten(0, -2), weight).view_as(scale).div_(-normed.size(-1))
        return (grad * weight).addcmul_(normed, along).mul_(scale), product.flatten(0, -2).sum(0), None


class SwiGLU(torch.autograd.Function):
    """SwiGLU that keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


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
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{race.op}, {n}: {text}")


def measure(race: Race, rounds: int, seconds: float) -> dict[str, tuple[float, tuple[float, float, float]]]:
    """By form: median CPU seconds of a call, and median and quartiles of its ratio to the first form's in the same round.

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
    return {name: (median(own), _quartiles([a / b for a, b in zip(own, first, strict=True)])) for name, own in times.items()}


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
    lines = ["| op | shape | formulation | µs of CPU time | against what a run takes |", "|---|---|---|--:|--:|"]
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
