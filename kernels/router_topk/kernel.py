"""The routing in Triton: scores, biased top-k, gates, counts, z-loss and balance statistics in one pass; see
README.md.

N tokens, E experts, K experts per token, G groups of experts. Sums over tokens leave one partial row per
program, which torch adds up: no atomics.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from hybridtrain.kernels.launch import Case, ceil_div, launch, num_bytes, partials, row_tile
from hybridtrain.kernels.router_topk.op import Routing, Rule


@triton.jit
def _scores(logits, real, SOFTMAX: tl.constexpr):
    """(scores, shares, softmax, log-sum-exp, sum of scores) of a tile whose missing columns are -inf."""
    highest = tl.max(logits, 1)
    power = tl.where(real, tl.exp(logits - highest[:, None]), 0.0)
    total = tl.sum(power, 1)
    softmax = power / total[:, None]
    if SOFTMAX:
        scores, mass = softmax, total * 0.0 + 1.0
    else:
        scores = tl.where(real, tl.sigmoid(logits), 0.0)
        mass = tl.sum(scores, 1)
    return scores, scores / mass[:, None], softmax, highest + tl.log(total), mass


@triton.jit
def _within_best_groups(
    rank, cols, size, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr
):  # fmt: skip
    """`rank` with -inf outside the groups, each of `size` columns, whose two highest ranks have the greatest
    sums.
    """
    groups = tl.arange(0, BLOCK_G)
    best = tl.full([BLOCK_N, BLOCK_G], float("-inf"), dtype=tl.float32)
    for group in range(GROUPS):
        inside = tl.where((cols // size == group)[None, :], rank, float("-inf"))
        total = tl.max(inside, 1)
        if size > 1:
            total += tl.max(
                tl.where(cols[None, :] == tl.argmax(inside, 1)[:, None], float("-inf"), inside), 1
            )
        best = tl.where((groups == group)[None, :], total[:, None], best)
    allowed = rank != rank
    for _ in range(TOP_GROUPS):
        taken = tl.argmax(best, 1)
        allowed = allowed | ((cols // size)[None, :] == taken[:, None])
        best = tl.where(groups[None, :] == taken[:, None], float("-inf"), best)
    return tl.where(allowed, rank, float("-inf"))


@triton.jit
def _forward_kernel(
    logits_ptr, bias_ptr, experts_ptr, gates_ptr, counts_ptr, shares_ptr, sums_ptr, N, E, scale, tiles, size,
    K: tl.constexpr, BLOCK_K: tl.constexpr, SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cols, places = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    bias = tl.load(bias_ptr + cols, mask=cols < E, other=0.0)
    counts, shares_sum = tl.zeros([BLOCK_D], dtype=tl.int32), tl.zeros([BLOCK_D], dtype=tl.float32)
    z, entropy = tl.zeros([BLOCK_N], dtype=tl.float32), tl.zeros([BLOCK_N], dtype=tl.float32)
    for tile in range(tiles):
        rows = (program.to(tl.int64) * tiles + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        tokens = rows < N
        real = tl.broadcast_to((cols < E)[None, :], [BLOCK_N, BLOCK_D])
        logits = tl.load(
            logits_ptr + rows[:, None] * E + cols[None, :], mask=real & tokens[:, None], other=0.0
        )
        logits = tl.where(real, logits, float("-inf"))
        scores, shares, _, lse, _ = _scores(logits, real, SOFTMAX)
        z += tl.where(tokens, lse * lse, 0.0)
        entropy -= tl.where(
            tokens,
            tl.sum(tl.where(shares > 0, shares * tl.log(tl.where(shares > 0, shares, 1.0)), 0.0), 1),
            0.0,
        )
        shares_sum += tl.sum(tl.where(tokens[:, None], shares, 0.0), 0)
        rank = tl.where(real, scores + bias[None, :], float("-inf"))
        rank = tl.where(
            rank == rank, rank, float("-inf")
        )  # a logit that is no number must not choose an expert that is none
        if GROUPS > 1:
            rank = _within_best_groups(rank, cols, size, GROUPS, TOP_GROUPS, BLOCK_G, BLOCK_N)
        experts = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.int32)
        gates = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        for i in range(K):
            best = tl.argmax(rank, 1)
            taken = cols[None, :] == best[:, None]
            gate = tl.sum(tl.where(taken, scores, 0.0), 1)
            experts = tl.where((places == i)[None, :], best[:, None], experts)
            gates = tl.where((places == i)[None, :], gate[:, None], gates)
            counts += tl.sum((taken & tokens[:, None]).to(tl.int32), 0)
            rank = tl.where(taken, float("-inf"), rank)
        if NORMALIZE:
            gates /= tl.maximum(tl.sum(gates, 1), 1e-20)[:, None]
        at = rows[:, None] * K + places[None, :]
        inside = tokens[:, None] & (places < K)[None, :]
        tl.store(experts_ptr + at, experts.to(tl.int64), mask=inside)
        tl.store(gates_ptr + at, gates * scale, mask=inside)
    tl.store(counts_ptr + program * E + cols, counts, mask=cols < E)
    tl.store(shares_ptr + program * E + cols, shares_sum, mask=cols < E)
    tl.store(sums_ptr + 2 * program, tl.sum(z, 0))
    tl.store(sums_ptr + 2 * program + 1, tl.sum(entropy, 0))


@triton.jit
def _backward_kernel(
    grad_gates_ptr, grad_shares_ptr, grad_z_ptr, logits_ptr, experts_ptr, grad_logits_ptr, N, E, scale,
    K: tl.constexpr, SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    tokens = rows < N
    real = tl.broadcast_to((cols < E)[None, :], [BLOCK_N, BLOCK_D])
    at = rows[:, None] * E + cols[None, :]
    logits = tl.load(logits_ptr + at, mask=real & tokens[:, None], other=0.0)
    logits = tl.where(real, logits, float("-inf"))
    scores, shares, softmax, lse, mass = _scores(logits, real, SOFTMAX)
    grad = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    chosen = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for i in range(K):
        expert = tl.load(experts_ptr + rows * K + i, mask=tokens, other=0)
        taken = cols[None, :] == expert[:, None]
        grad += tl.where(
            taken, tl.load(grad_gates_ptr + rows * K + i, mask=tokens, other=0.0)[:, None] * scale, 0.0
        )
        chosen += taken.to(tl.float32)
    if NORMALIZE:
        total = tl.sum(chosen * scores, 1)
        along = tl.sum(grad * scores, 1) / tl.maximum(total, 1e-20)
        along = tl.where(total > 1e-20, along, 0.0)
        grad = (grad - chosen * along[:, None]) / tl.maximum(total, 1e-20)[:, None]
    if grad_shares_ptr is not None:
        grad_shares = tl.load(grad_shares_ptr + cols, mask=cols < E, other=0.0)[None, :]
        if SOFTMAX:
            grad += grad_shares
        else:
            grad += (grad_shares - tl.sum(shares * grad_shares, 1)[:, None]) / mass[:, None]
    if SOFTMAX:
        grad = scores * (grad - tl.sum(scores * grad, 1)[:, None])
    else:
        grad *= scores * (1.0 - scores)
    if grad_z_ptr is not None:
        grad += softmax * (2.0 * lse * tl.load(grad_z_ptr))[:, None]
    tl.store(grad_logits_ptr + at, grad, mask=real & tokens[:, None])


def _forward(
    logits_NE: Tensor,
    bias_E: Tensor,
    k: int,
    softmax: bool,
    normalize: bool,
    scale: float,
    groups: int,
    top_groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gates, experts, counts, shares, and [z, entropy] in one tensor."""
    N, E = logits_NE.shape
    tile, warps = row_tile(E, elements=1024)
    programs, tiles = partials(ceil_div(N, tile["BLOCK_N"]))
    experts, gates = logits_NE.new_empty(N, k, dtype=torch.int64), logits_NE.new_empty(N, k)
    counts, shares = logits_NE.new_empty(programs, E, dtype=torch.int32), logits_NE.new_empty(programs, E)
    sums = logits_NE.new_empty(programs, 2)
    limits = {"GROUPS": groups, "TOP_GROUPS": top_groups, "BLOCK_G": triton.next_power_of_2(groups)}
    launch(
        _forward_kernel, (programs,), logits_NE, bias_E, experts, gates, counts, shares, sums, N, E, scale,
        tiles, E // groups,
        constants={"K": k, "BLOCK_K": triton.next_power_of_2(k), "SOFTMAX": softmax, "NORMALIZE": normalize,
        **limits, **tile},
        num_warps=warps,
    )  # fmt: skip
    return gates, experts, counts.sum(0, dtype=torch.int64), shares.sum(0), sums.sum(0)


def _backward(
    grad_gates_NK: Tensor, grad_shares_E: Tensor | None, grad_z: Tensor | None, logits_NE: Tensor,
    experts_NK: Tensor, softmax: bool, normalize: bool, scale: float,
) -> Tensor:  # fmt: skip
    grad_logits = torch.empty_like(logits_NE)
    N, E = logits_NE.shape
    tile, warps = row_tile(E, elements=1024)
    launch(
        _backward_kernel, (ceil_div(N, tile["BLOCK_N"]),), grad_gates_NK, grad_shares_E, grad_z, logits_NE,
        experts_NK,
        grad_logits, N, E, scale,
        constants={"K": experts_NK.size(1), "SOFTMAX": softmax, "NORMALIZE": normalize, **tile},
        num_warps=warps,
    )  # fmt: skip
    return grad_logits


# the gates come first: opcheck adds up the outputs in the type of the first one
_op = custom_op("hybridtrain::router_topk", _forward, mutates_args=())
_op_backward = custom_op("hybridtrain::router_topk_backward", _backward, mutates_args=())


@_op.register_fake
def _(
    logits_NE: Tensor,
    bias_E: Tensor,
    k: int,
    softmax: bool,
    normalize: bool,
    scale: float,
    groups: int,
    top_groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    N, E = logits_NE.shape
    new, whole = logits_NE.new_empty, torch.int64
    return new(N, k), new(N, k, dtype=whole), new(E, dtype=whole), new(E), new(2)


@_op_backward.register_fake
def _(
    grad_gates_NK: Tensor, grad_shares_E: Tensor | None, grad_z: Tensor | None, logits_NE: Tensor,
    experts_NK: Tensor, softmax: bool, normalize: bool, scale: float,
) -> Tensor:  # fmt: skip
    return torch.empty_like(logits_NE)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_NE, _, _, *ctx.options = inputs[:6]
    _, experts, counts, _, _ = output
    ctx.mark_non_differentiable(experts, counts)
    ctx.set_materialize_grads(False)  # no zeros for what no loss reads
    ctx.save_for_backward(logits_NE, experts)


def _gradients(ctx: Any, grad_gates: Tensor | None, *others: Tensor | None) -> Any:
    _, _, grad_shares, grad_sums = others  # the first of the sums is z
    logits_NE, experts_NK = ctx.saved_tensors
    if grad_gates is None:
        grad_gates = logits_NE.new_zeros(experts_NK.shape)
    grads = (g.contiguous() if g is not None else None for g in (grad_gates, grad_shares, grad_sums))
    return _op_backward(*grads, logits_NE, experts_NK, *ctx.options), *[None] * 7


_op.register_autograd(_gradients, setup_context=_setup)


def router_topk(logits_NE: Tensor, bias_E: Tensor, rule: Rule) -> Routing:
    """As reference.router_topk, for float32 logits; of equal scores the first is taken.

    Raises ValueError where the rule does not fit the number of experts.
    """
    E, k, groups = logits_NE.size(1), rule.top_k, rule.num_groups
    if E % groups or not 0 < rule.top_groups <= groups or k > E // groups * rule.top_groups:
        raise ValueError(f"k={k} experts of {rule.top_groups} of {groups} groups do not fit {E} experts")
    options = (k, rule.score == "softmax", rule.normalize, rule.scale, groups, rule.top_groups)
    gates, experts, counts, shares, sums = _op(logits_NE.contiguous(), bias_E, *options)
    balance = (shares if rule.shares else None, sums[0] if rule.z else None)
    return Routing(experts, gates, counts, *balance, sums[1].detach())


def cases() -> Iterator[Case]:
    """256 experts, eight a token, as in DeepSeek-V3, with its groups and without."""
    N, E, K = 65536, 256, 8
    logits = torch.empty(N, E, device="meta")
    bias, gates, experts = (
        logits.new_empty(E),
        logits.new_empty(N, K),
        logits.new_empty(N, K, dtype=torch.int64),
    )
    shape = f"N={N} E={E} K={K} sigmoid"
    pairs = num_bytes(gates, experts)
    for groups, top_groups in ((1, 1), (8, 4)):
        run = partial(_forward, logits, bias, K, False, True, 1.0, groups, top_groups)
        limits = f", {top_groups} of {groups} groups" if groups > 1 else ""
        yield Case("router_topk", f"forward {shape}{limits}", run, num_bytes(logits) + pairs)
    back = partial(_backward, gates, bias, bias[0], logits, experts, False, True, 1.0)
    yield Case("router_topk", f"backward {shape}", back, 2 * num_bytes(logits) + pairs)
