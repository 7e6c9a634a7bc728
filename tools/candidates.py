"""The formulations of every op of a training step that bench_candidates.py times: as a run does it, and
others.

N tokens of width D, V vocabulary; other sizes are the quickstart's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridtrain.kernels.cross_entropy import op as cross_entropy
from hybridtrain.kernels.engram import op as engram
from hybridtrain.kernels.engram import reference as engram_reference
from hybridtrain.kernels.engram_hash import op as engram_hash
from hybridtrain.kernels.engram_hash import reference as hash_reference
from hybridtrain.kernels.engram_hash.addressing import Addressing, TableShape
from hybridtrain.kernels.grouped_mlp.op import grouped_swiglu
from hybridtrain.kernels.linear_cross_entropy import op as linear_cross_entropy
from hybridtrain.kernels.moe_swiglu.op import Choice, ExpertWeights, moe_swiglu, sort_by_expert
from hybridtrain.kernels.norms import op as norms
from hybridtrain.kernels.norms import reference as norms_reference
from hybridtrain.kernels.permute import op as permute
from hybridtrain.kernels.permute import reference as permute_reference
from hybridtrain.kernels.router_topk import op as router_topk
from hybridtrain.kernels.rows import op as row_ops
from hybridtrain.kernels.swiglu import op as swiglu
from hybridtrain.kernels.swiglu import reference as swiglu_reference

Form = Callable[..., Any]


@dataclass(frozen=True)
class Race:
    """Formulations of one op over the same inputs; the first is what a run takes. Floating-point inputs that
    require one get a gradient."""

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
    yield from _engram(N, D)


def leaf(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).requires_grad_()


def _norms(N: int, D: int) -> Iterator[Race]:
    forms: dict[str, Form] = {
        "gradient by hand": lambda x, w: norms.rms_norm(x, w, 1e-6),
        "F.rms_norm": lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
        "definition": lambda x, w: norms_reference.rms_norm(x, w, 1e-6),
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
            "complex product": lambda x: norms.rope(x, turn),
            "complex, broadcast": lambda x: torch.view_as_real(
                torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn[:, None]
            ).flatten(-2),
            "definition": lambda x: norms_reference.rope(x, real, None, 0.0),
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
            "blocks of tokens": lambda h, w: linear_cross_entropy.linear_cross_entropy_sum(
                h, w, targets, -100
            ),
            "product, then cross_entropy": lambda h, w: cross_entropy.cross_entropy_sum(
                F.linear(h, w), targets, -100
            ),
            "F.linear_cross_entropy in chunks": lambda h, w: F.linear_cross_entropy(
                h,
                w,
                targets,
                reduction="sum",
                ignore_index=-100,
                options=torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True),
            ),
            "F.linear, F.cross_entropy": lambda h, w: F.cross_entropy(
                F.linear(h, w), targets, reduction="sum"
            ),
        },
    )


def _experts(N: int, D: int) -> Iterator[Race]:
    E, K, width = 8, 2, 3 * D // 2
    experts = torch.rand(N, E).topk(K).indices
    weights = (
        leaf(E, D, width, scale=D**-0.5),
        leaf(E, D, width, scale=D**-0.5),
        leaf(E, width, D, scale=width**-0.5),
    )

    def grouped(x: Tensor, gates: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        order, inverse, counts = sort_by_expert(experts, E)
        y = grouped_swiglu(permute.permute(x, order, inverse), counts, w_gate, w_up, w_down)
        return permute.combine(y, gates, order, inverse)

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
            "expert by expert in cache": lambda x, gates, *w: moe_swiglu(
                x, Choice(experts, gates), ExpertWeights(*w)
            ),
            "grouped_mm": grouped,
            "autograd, expert by expert": one_by_one,
        },
    )


def _places_by_hits(experts_NK: Tensor, each: int, ranks: int) -> Tensor:
    """Where each token's first choice on a rank stands, by a table of tokens and ranks."""
    owner_NK = experts_NK // each
    hits_NR = torch.zeros(len(experts_NK), ranks, dtype=torch.bool).scatter_(1, owner_NK, True)
    rank_P, token_P = hits_NR.T.nonzero(as_tuple=True)
    first_P = (owner_NK[token_P] == rank_P[:, None]).to(torch.int8).argmax(1)
    inverse_NK = torch.full_like(experts_NK, -1)
    inverse_NK[token_P, first_P] = torch.arange(len(token_P))
    return inverse_NK


def _tokens(N: int, D: int) -> Iterator[Race]:
    E, K, R = 8, 2, 2
    experts = torch.rand(N, E).topk(K).indices
    yield Race(
        "permute: destinations",
        f"[{N}, {K}], {R} ranks",
        (experts,),
        {
            "stable sort": lambda e: permute.sort_by_destination(e, E, R)[1],
            "table of hits": lambda e: _places_by_hits(e, E // R, R),
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
            "embedding_bag": lambda y: F.embedding_bag(
                stands.where(stands >= 0, zero), F.pad(y, (0, 0, 0, 1)), mode="sum"
            ),
        },
    )
    order, inverse, _ = sort_by_expert(experts, E)
    gates = torch.rand(N, K).requires_grad_()
    yield Race(
        "permute: there and back",
        f"[{N}, {D}], top {K}",
        (leaf(N, D), gates),
        {
            "gathers, gradient by hand": lambda x, g: permute.combine(
                permute.permute(x, order, inverse), g, order, inverse
            ),
            "definition": lambda x, g: permute_reference.combine(
                permute_reference.permute(x, order, inverse), g, order, inverse
            ),
        },
    )


def _rows(N: int) -> Iterator[Race]:
    C, slots, unique = 32, 8, 7 * N
    index = torch.randint(unique, (N, slots))
    yield Race(
        "row_gather",
        f"[{N}, {slots}] of [{unique}, {C}]",
        (leaf(unique, C),),
        {
            "index_select, ordered sums": lambda rows: row_ops.row_gather(rows, index),
            "F.embedding": lambda rows: F.embedding(index, rows),
            "rows[index]": lambda rows: rows[index],
        },
    )
    values, segment, num = torch.randn(unique, C), torch.randint(6 * N, (unique,)), 6 * N
    column = segment[:, None].expand(-1, C)
    yield Race(
        "segment_sum",
        f"[{unique}, {C}] to [{num}, {C}]",
        (values,),
        {
            "index_add": lambda v: row_ops.segment_sum(v, segment, num),
            "scatter_add": lambda v: v.new_zeros(num, C).scatter_add_(0, column, v),
            "sort, embedding_bag": lambda v: row_ops._by_bags(v, segment, num),
        },
    )
    addressing = Addressing.draw(
        TableShape([1], [2, 3], 4, 16_384), torch.arange(4096).numpy(), pad_id=0, seed=5
    )
    tokens, starts = torch.randint(4096, (N // 128, 128)), torch.rand(N // 128, 128) < 0.02
    yield Race(
        "engram_hash",
        f"[{N // 128}, 128], 8 ids a token",
        (tokens, starts),
        {
            "torch": lambda t, s: engram_hash.row_ids(addressing, t, s),
            "definition (numpy)": lambda t, s: torch.from_numpy(
                hash_reference.row_ids(addressing, t.numpy(), s.numpy())
            ),
        },
    )


def _engram(N: int, D: int) -> Iterator[Race]:
    T = 128
    h, k, v = (leaf(N // T, T, D) for _ in range(3))
    yield Race(
        "engram_gate",
        f"[{N // T}, {T}, {D}]",
        (h, k, v, leaf(D), leaf(D)),
        {
            "two norms, dot": lambda h, k, v, h_weight, k_weight: engram.engram_gate(
                h, k, v, engram.GateNorms(h_weight, k_weight, 1e-6, 0.1)
            )[0],
            "definition": lambda h, k, v, *w: engram_reference.engram_gate(
                h.view(N, 1, D), k.view(N, 1, D), v.view(N, D), *(x[None] for x in w), 1e-6, 0.1
            )[0].view(h.shape),
            "norms folded into the dot": _folded_gate,
        },
    )
    yield Race(
        "short_conv",
        f"[{N // T}, {T}, {D}], 4 taps",
        (leaf(N // T, T, D), leaf(D), leaf(4, D)),
        {
            "tap by tap": lambda u, w, taps: engram.short_conv(u, w, taps, None, engram.ConvRule(3, 1e-6)),
            "definition": lambda u, w, taps: engram_reference.short_conv(u, w, taps, None, 3, 1e-6),
            "F.conv1d": lambda u, w, taps: (
                F.silu(
                    F.conv1d(
                        F.pad(norms.rms_norm(u, w, 1e-6).mT, (9, 0)),
                        taps.t()[:, None],
                        groups=D,
                        dilation=3,
                    ).mT
                )
                + u
            ),
        },
    )
    bias, rule = torch.zeros(8), router_topk.Rule(2, "softmax", True, 1.0)

    def joined(routing: router_topk.Routing) -> Tensor:
        """The quickstart has no balance losses: the gates alone have a gradient."""
        return torch.cat([routing.gates_NK.flatten(), routing.shares_E.detach(), routing.z[None].detach()])

    def shared_sum(logits: Tensor) -> Tensor:
        lse = logits.logsumexp(-1, keepdim=True)
        scores = (logits - lse).exp()
        gates, _ = scores.topk(2, -1)
        gates = gates / gates.sum(-1, keepdim=True).clamp_min(1e-20)
        torch.bincount(scores.detach().topk(2, -1).indices.flatten(), minlength=8)
        torch.special.entr(scores.detach()).sum()
        return torch.cat([gates.flatten(), scores.detach().sum(0), lse.detach().square().sum()[None]])

    forms: dict[str, Form] = {
        "definition": lambda x: joined(router_topk.router_topk(x, bias, rule)),
        "softmax by the z-loss's sum": shared_sum,
    }
    yield Race("router_topk", f"[{N}, 8], top 2", (leaf(N, 8),), forms)


def _folded_gate(h: Tensor, k: Tensor, v: Tensor, h_weight: Tensor, k_weight: Tensor) -> Tensor:
    D = h.size(-1)
    scale = (h.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (
        k.square().mean(-1, keepdim=True) + 1e-6
    ).rsqrt()
    s = (h * k * (h_weight * k_weight)).sum(-1, keepdim=True) * scale / D**0.5
    return torch.sigmoid(s.sign() * s.abs().clamp_min(0.1).sqrt()) * v


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
