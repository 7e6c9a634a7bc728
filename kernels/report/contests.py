"""What the benchmark times: every op at one shape or two, its definition, and how libraries do it.

N tokens, D model width; other letters as in the ops' own files.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hybridtrain.kernels.ops import OPS

BFLOAT16_ERROR = 2.0**-6  # of the greatest element: a few roundings of bfloat16 inputs and outputs
FP8_ERROR = 2.0**-3  # likewise, through two products of FP8 one after the other
FLOAT32_ERROR = 2.0**-16  # sums and exponentials in another order
EPS = 1e-6

Candidate = Callable[..., Any]  # of the contest's inputs, to a tensor or a tuple of them


@dataclass(frozen=True)
class Contest:
    """One op at one shape: `fused`, `reference` and `others` take `inputs`.

    moved: bytes that forward and backward must move; flops: of the products of both. Where `trains`, outputs
    with a gradient are differentiated by all floating-point inputs. `error` is what the output and gradients
    may be off, in units of their greatest element; integers must be equal. `inputs` may be changed in place
    by the candidates.
    """

    op: str
    shape: str
    inputs: tuple[Tensor, ...]
    fused: Candidate
    reference: Candidate
    moved: int
    flops: int = 0
    others: dict[str, Candidate] = field(default_factory=dict)
    error: float = BFLOAT16_ERROR
    trains: bool = True


def contests(device: str, N: int = 16384, D: int = 4096) -> Iterator[Contest]:
    """Every op with a kernel; N and D of production size, or small ones to see that all is right."""
    for made in (_norms, _elementwise, _losses, _permutations, _experts, _engram, _table, _routing, _depth):
        yield from made(device, N, D)


def _modules(op: str) -> tuple[Any, Any]:
    """Its Triton kernels, and its definition."""
    source = OPS[op].sources[0]
    definition = _DEFINITIONS.get(op, f"{source.partition('.')[0]}.reference")
    kernel, reference = (
        importlib.import_module(f"hybridtrain.kernels.{name}") for name in (source, definition)
    )
    return kernel, reference


_DEFINITIONS = {"router_topk": "router_topk.op"}  # where that is not reference.py


def _normal(device: str, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).bfloat16()


def _libraries(**candidates: tuple[str, str, Callable[[Any], Candidate]]) -> dict[str, Candidate]:
    """What is installed of name=(module, function, the call that it makes of the function); imported when it
    is called.
    """

    def lazy(module: str, function: str, use: Callable[[Any], Candidate]) -> Candidate:
        return lambda *inputs: use(getattr(importlib.import_module(module), function))(*inputs)

    return {
        name: lazy(*how)
        for name, how in candidates.items()
        if importlib.util.find_spec(how[0].partition(".")[0])
    }


def _norms(device: str, N: int, D: int) -> Iterator[Contest]:
    fused: Candidate
    plain: Candidate
    kernel, reference = _modules("rms_norm")
    x, r, w, size = _normal(device, N, D), _normal(device, N, D), _normal(device, D), 2 * N * D
    others: dict[str, Candidate] = {"torch fused": lambda x, w: F.rms_norm(x, w.shape, w, EPS)}
    others |= _libraries(
        liger=(
            "liger_kernel.transformers.functional",
            "liger_rms_norm",
            lambda f: lambda x, w: f(x, w, EPS, in_place=False),
        ),
        fla=("fla.modules.layernorm", "rms_norm", lambda f: lambda x, w: f(x, w, None, eps=EPS)),
        apex=(
            "apex.normalization.fused_layer_norm",
            "fused_rms_norm_affine",
            lambda f: lambda x, w: f(x, w, w.shape, EPS),
        ),
    )
    fused, plain = (lambda x, w, f=f: f(x, w, EPS) for f in (kernel.rms_norm, reference.rms_norm))
    yield Contest("rms_norm", f"N={N} D={D}", (x, w), fused, plain, 5 * size, 0, others)
    others = {"torch fused": lambda x, r, w: (F.rms_norm(x + r, w.shape, w, EPS), x + r)}
    others |= _libraries(
        liger=(
            "liger_kernel.transformers.functional",
            "liger_fused_add_rms_norm",
            lambda f: lambda x, r, w: f(x, r, w, EPS, in_place=False),
        ),
        fla=(
            "fla.modules.layernorm",
            "rms_norm",
            lambda f: lambda x, r, w: f(x, w, None, r, prenorm=True, eps=EPS),
        ),
    )
    plain = lambda x, r, w: (reference.rms_norm(x + r, w, EPS), x + r)  # noqa: E731
    fused = lambda x, r, w: kernel.add_rms_norm(x, r, w, EPS)  # noqa: E731
    yield Contest("rms_norm", f"with residual N={N} D={D}", (x, r, w), fused, plain, 8 * size, 0, others)


def _elementwise(device: str, N: int, D: int) -> Iterator[Contest]:
    fused: Candidate
    plain: Candidate
    kernel, reference = _modules("swiglu")
    inputs = _normal(device, N, D), _normal(device, N, D)
    others = _libraries(
        liger=("liger_kernel.transformers.functional", "liger_swiglu", lambda f: f),
        fla=("fla.modules.activations", "swiglu", lambda f: f),
    )
    yield Contest("swiglu", f"N={N} F={D}", inputs, kernel.swiglu, reference.swiglu, 16 * N * D, 0, others)

    kernel, reference = _modules("rope")
    turn = torch.randn(N, 128, device=device)
    heads, weight = _normal(device, 1, N, max(1, D // 128), 128), _normal(device, 128)
    size = 2 * heads.numel()
    cos, sin = turn[:, 0::2].bfloat16(), turn[:, 1::2].bfloat16()  # fla wants them in the dtype of the input
    rotary = "fla.modules.rotary", "rotary_embedding", lambda f: lambda x: f(x, cos, sin, interleaved=True)
    fused, plain = (lambda x, f=f: f(x, turn, None, EPS) for f in (kernel.rope, reference.rope))
    yield Contest("rope", f"N={N} C=128", (heads,), fused, plain, 4 * size, 0, _libraries(fla=rotary))
    fused, plain = (lambda x, w, f=f: f(x, turn, w, EPS) for f in (kernel.rope, reference.rope))
    yield Contest("rope", f"normed N={N} C=128", (heads, weight), fused, plain, 5 * size)


def _losses(device: str, N: int, D: int) -> Iterator[Contest]:
    fused: Candidate
    plain: Candidate
    kernel, reference = _modules("cross_entropy")
    N, V = max(1, N // 4), 8 * D
    targets, logits = torch.randint(0, V, (N,), device=device), _normal(device, N, V)
    others: dict[str, Candidate] = {"torch fused": lambda x: F.cross_entropy(x, targets, reduction="sum")}
    others |= _libraries(
        fla=(
            "fla.modules.fused_cross_entropy",
            "cross_entropy_loss",
            lambda f: lambda x: f(x, targets)[0].sum(),
        ),
    )
    fused, plain = (
        lambda x, f=f: f(x, targets, -1) for f in (kernel.cross_entropy_sum, reference.cross_entropy_sum)
    )
    yield Contest("cross_entropy", f"N={N} V={V}", (logits,), fused, plain, 6 * N * V, 0, others)

    inputs = _normal(device, N, D), _normal(device, V, D) / D**0.5
    others = {"torch fused": lambda h, w: F.cross_entropy(F.linear(h, w), targets, reduction="sum")}
    head = "fused_linear_cross_entropy"
    others |= _libraries(
        liger=(
            "liger_kernel.transformers.functional",
            f"liger_{head}",
            lambda f: lambda h, w: f(h, w, targets, reduction="sum"),
        ),
        fla=(f"fla.modules.{head}", f"{head}_loss", lambda f: lambda h, w: f(h, targets, w, reduction="sum")),
    )
    fused = lambda h, w: kernel.linear_cross_entropy_sum(h, w, targets, -1)  # noqa: E731
    plain = lambda h, w: reference.cross_entropy_sum(h @ w.t(), targets, -1)  # noqa: E731
    moved = 3 * 2 * (N * D + V * D)
    yield Contest(
        "cross_entropy",
        f"with the head N={N} D={D} V={V}",
        inputs,
        fused,
        plain,
        moved,
        6 * N * D * V,
        others,
    )


def _permutations(device: str, N: int, D: int) -> Iterator[Contest]:
    fused: Candidate
    plain: Candidate
    from hybridtrain.kernels.moe_swiglu.op import sort_by_expert

    kernel, reference = _modules("permute")
    N, K, E = max(1, N // 2), 8, 64
    experts = torch.rand(N, E, device=device).topk(K).indices
    order, inverse, _ = sort_by_expert(experts, E)
    shape, size = f"N={N} K={K} D={D}", 2 * N * D
    fused, plain = (lambda x, f=f: f(x, order, inverse) for f in (kernel.permute, reference.permute))
    yield Contest("permute", f"permute {shape}", (_normal(device, N, D),), fused, plain, 2 * (1 + K) * size)
    fused, plain = (lambda y, g, f=f: f(y, g, order, inverse) for f in (kernel.combine, reference.combine))
    inputs = _normal(device, N * K, D), torch.rand(N, K, device=device)
    yield Contest("permute", f"combine {shape}", inputs, fused, plain, 2 * (1 + K) * size + K * size)
    fused, plain = (
        lambda e, f=f: f(e, E, 16) for f in (kernel.sort_by_destination, reference.sort_by_destination)
    )
    yield Contest("permute", f"destinations N={N} K={K} R=16", (experts,), fused, plain, 3 * 8 * N * K)


def _experts(device: str, N: int, D: int) -> Iterator[Contest]:
    kernel, reference = _modules("grouped_mlp")
    fp8, op = (importlib.import_module(f"hybridtrain.kernels.grouped_mlp.{name}") for name in ("fp8", "op"))
    E, width = 16, D // 2
    counts = torch.bincount(
        torch.arange(N, device=device).square() % E, minlength=E
    )  # uneven, and some experts have none
    shapes = (E, D, width), (E, D, width), (E, width, D)
    weights = [_normal(device, *s) / s[1] ** 0.5 for s in shapes]
    fused, plain, eight = (
        lambda x, *w, f=f: f(x, counts, *w)
        for f in (kernel.grouped_swiglu, reference.grouped_swiglu, fp8.grouped_swiglu)
    )
    moved = 3 * 2 * (2 * N * D + sum(w.numel() for w in weights))
    shape, inputs = f"P={N} E={E} D={D} F={width}", (_normal(device, N, D), *weights)
    others: dict[str, Candidate] = {"grouped_mm": lambda x, *w: op.grouped_swiglu(x, counts, *w)}
    contest = Contest("grouped_mlp", shape, inputs, fused, plain, moved, 18 * N * D * width, others)
    yield contest
    if device == "cpu" or torch.cuda.get_device_capability() >= (8, 9):
        yield replace(contest, shape=f"{shape} fp8", fused=eight, others={}, error=FP8_ERROR)


def _engram(device: str, N: int, D: int) -> Iterator[Contest]:
    fused: Candidate
    plain: Candidate
    kernel, reference = _modules("engram_gate")
    size = 2 * N * D
    gate = (
        _normal(device, N, 1, D),
        _normal(device, N, 1, D),
        _normal(device, N, D),
        *(_normal(device, 1, D) for _ in range(2)),
    )
    fused, plain = (lambda *t, f=f: f(*t, EPS, 0.01)[0] for f in (kernel.engram_gate, reference.engram_gate))
    yield Contest("engram_gate", f"N={N} D={D}", gate, fused, plain, 11 * size)

    kernel, reference = _modules("short_conv")
    documents = (torch.rand(1, N, device=device) < 0.01).cumsum(1)
    fused, plain = (
        lambda *t, f=f: f(*t, documents, 3, EPS) for f in (kernel.short_conv, reference.short_conv)
    )
    inputs = _normal(device, 1, N, D), _normal(device, D), _normal(device, 4, D)
    yield Contest("short_conv", f"N={N} D={D} J=4", inputs, fused, plain, 5 * size)

    from hybridtrain.kernels.engram_hash import kernel as hashing
    from hybridtrain.kernels.engram_hash import op
    from hybridtrain.kernels.engram_hash.addressing import Addressing, TableShape

    addressing = Addressing.draw(
        TableShape([1, 3], [2, 3, 4], 8, 100_000), np.arange(1000) % 900, pad_id=7, seed=5
    )
    tokens, starts = torch.randint(0, 1000, (1, N), device=device), torch.rand(1, N, device=device) < 0.01
    fused, plain = (lambda t, s, f=f: f(addressing, t, s) for f in (hashing.row_ids, op.row_ids))
    yield Contest("engram_hash", f"N={N} S=48", (tokens, starts), fused, plain, N * (9 + 48 * 8))


def _table(device: str, N: int, D: int) -> Iterator[Contest]:
    fused: Candidate
    plain: Candidate
    R, U, C = 64 * N, 8 * N, min(D, 256)
    rows = torch.randperm(R, device=device)[:U].sort().values
    kernel, reference = _modules("row_gather")
    table, index = _normal(device, U, C), torch.randint(U, (N, 8), device=device)
    fused = lambda t, i, f=kernel.row_gather: f(t, i.flatten())  # noqa: E731
    plain = lambda t, i, f=reference.row_gather: f(t, i.flatten())  # noqa: E731
    others: dict[str, Candidate] = {"F.embedding": lambda t, i: F.embedding(i.flatten(), t)}
    yield Contest(
        "row_gather", f"R={U} U={U} C={C}", (table, index), fused, plain, 10 * U * C + 16 * U, 0, others
    )

    kernel, _ = _modules("segment_sum")
    values, segment = torch.randn(U, C, device=device), torch.randint(0, U // 2, (U,), device=device)
    plain = lambda v, s: v.new_zeros(U // 2, C).index_add_(0, s, v)  # noqa: E731
    fused = lambda v, s, f=kernel.segment_sum: f(v, s, U // 2)  # noqa: E731
    shape, inputs = f"U={U} to {U // 2} C={C}", (values, segment)
    yield Contest(
        "segment_sum", shape, inputs, fused, plain, 6 * U * C + 8 * U, error=FLOAT32_ERROR, trains=False
    )

    from hybridtrain.kernels.rowwise_adam import kernel as updating
    from hybridtrain.kernels.rowwise_adam import op

    def update(how: Candidate) -> Candidate:
        def run(table: Tensor, v: Tensor, last: Tensor, rows: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
            step = op.Step(9, 1e-3, 1e-8, 0.95, 0.05, 0.9)
            how(op.RowState(table, v, last), rows, grad, None, step)
            return table, v, last

        return run

    last = torch.randint(0, 9, (R,), dtype=torch.int32, device=device)
    state = torch.randn(R, C, device=device), torch.rand(R, device=device), last, rows, values
    fused, plain = update(updating.rowwise_adam), update(op.rowwise_adam)
    shape, moved = f"R={R} U={U} C={C}", U * (12 * C + 24)
    yield Contest("rowwise_adam", shape, state, fused, plain, moved, error=FLOAT32_ERROR, trains=False)


def _routing(device: str, N: int, D: int) -> Iterator[Contest]:
    kernel, reference = _modules("router_topk")
    N, E, K = 4 * N, 256, 8
    logits = (
        torch.rand(N, E, device=device).argsort(-1) / 32 - 4
    )  # far enough apart for one choice of experts
    bias, rule = torch.zeros(E, device=device), reference.Rule(K, "sigmoid", True, 1.0)
    fused, plain = (
        lambda x, f=f: tuple(f(x, bias, rule)) for f in (kernel.router_topk, reference.router_topk)
    )
    moved = 4 * (3 * N * E + 4 * N * K)
    shape = f"N={N} E={E} K={K}"
    yield Contest("router_topk", shape, (logits,), fused, plain, moved, error=FLOAT32_ERROR)


def _depth(device: str, N: int, D: int) -> Iterator[Contest]:
    kernel, reference = _modules("depth_attention")
    N, S = max(1, N // 2), 32
    inputs = _normal(device, N, 32, 64), _normal(device, N, S, 8, 64), _normal(device, N, S, 8, 64)
    fused, plain = (
        lambda *t, f=f: f(*t, 0.125)[0] for f in (kernel.depth_attention, reference.depth_attention)
    )
    size = sum(2 * t.numel() for t in inputs)
    yield Contest(
        "depth_attention",
        f"N={N} H=32 G=8 S={S} C=64",
        inputs,
        fused,
        plain,
        3 * size + 4 * 2 * inputs[0].numel(),
    )
