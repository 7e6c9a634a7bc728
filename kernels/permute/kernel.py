"""The permutation in Triton: gathers of whole rows both ways, a weighted sum back, and padding of groups for
aligned products.

N tokens, K experts per token, P = N*K pairs, Q places, D width, R ranks. A place with no pair has order -1
and a row of zeros; a pair that stands nowhere has inverse -1 and adds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from hybridtrain.kernels.launch import Case, ceil_div, launch, num_bytes, row_tile


@triton.jit
def _spread_kernel(
    x_ptr, order_ptr, gates_ptr, y_ptr, out_ptr, grad_gates_ptr, Q, K, D,
    GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[q] = x[order[q] // K], times the pair's gate where GATED, which also makes <y[q], x[order[q] // K]>
    for each pair.
    """
    places = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    pairs = tl.load(order_ptr + places, mask=places < Q, other=-1)
    inside = (places < Q)[:, None] & (cols < D)[None, :]
    real = inside & (pairs >= 0)[:, None]
    at = places[:, None] * D + cols[None, :]
    x = tl.load(x_ptr + (pairs // K)[:, None] * D + cols[None, :], mask=real, other=0.0)
    if GATED:
        x = x.to(tl.float32)
        along = tl.sum(x * tl.load(y_ptr + at, mask=real, other=0.0).to(tl.float32), 1)
        tl.store(grad_gates_ptr + pairs, along.to(grad_gates_ptr.dtype.element_ty), mask=pairs >= 0)
        x *= tl.load(gates_ptr + pairs, mask=pairs >= 0, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _collect_kernel(
    y_ptr, inverse_ptr, gates_ptr, out_ptr, N, K, D, GATED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr
):  # fmt: skip
    """out[n] = the sum over k, rising, of y[inverse[n, k]], each times its gate where GATED."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    inside = (rows < N)[:, None] & (cols < D)[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for k in range(K):
        places = tl.load(inverse_ptr + rows * K + k, mask=rows < N, other=-1)
        y = tl.load(
            y_ptr + places[:, None] * D + cols[None, :], mask=inside & (places >= 0)[:, None], other=0.0
        ).to(tl.float32)
        if GATED:
            y *= tl.load(gates_ptr + rows * K + k, mask=rows < N, other=0.0).to(tl.float32)[:, None]
        total += y
    tl.store(out_ptr + rows[:, None] * D + cols[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _goes(experts_ptr, rows, k, N, K, here, ranks):
    """Whether the k-th expert of each token is on each rank, which has `here` of them."""
    experts = tl.load(experts_ptr + rows * K + k, mask=rows < N, other=-1)
    return (experts >= 0)[:, None] & ((experts // here)[:, None] == ranks[None, :])


@triton.jit
def _count_kernel(
    experts_ptr, tokens_ptr, pairs_ptr, N, K, R, here, tiles, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """tokens[r, tile] and pairs[r, tile] that a tile of tokens has for rank r."""
    tile = tl.program_id(0)
    rows = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_D)
    pairs = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.int32)
    for k in range(K):
        pairs += _goes(experts_ptr, rows, k, N, K, here, ranks).to(tl.int32)
    tl.store(tokens_ptr + ranks * tiles + tile, tl.sum((pairs > 0).to(tl.int32), 0), mask=ranks < R)
    tl.store(pairs_ptr + ranks * tiles + tile, tl.sum(pairs, 0), mask=ranks < R)


@triton.jit
def _line_up_kernel(
    experts_ptr, starts_ptr, order_ptr, inverse_ptr, N, K, R, here, tiles, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr
):  # fmt: skip
    """The places of a tile's tokens, which begin at starts[r, tile] on rank r."""
    tile = tl.program_id(0)
    rows = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_D)
    goes = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.int32)
    for k in range(K):
        goes |= _goes(experts_ptr, rows, k, N, K, here, ranks).to(tl.int32)
    starts = tl.load(starts_ptr + ranks * tiles + tile, mask=ranks < R, other=0)
    places = starts[None, :] + tl.cumsum(goes, 0) - 1
    stands = (ranks < R)[None, :] & (goes > 0)  # for this token no earlier choice does
    for k in range(K):
        own = _goes(experts_ptr, rows, k, N, K, here, ranks) & stands
        stands = stands & (own == 0)
        place = tl.max(tl.where(own, places, -1), 1)
        tl.store(order_ptr + place, rows * K + k, mask=place >= 0)
        tl.store(inverse_ptr + rows * K + k, place, mask=rows < N)


def _line_up(experts_NK: Tensor, num_experts: int, num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    N, K = experts_NK.shape
    tile, warps = row_tile(num_ranks)
    tiles = ceil_div(N, tile["BLOCK_N"])
    tokens, pairs = (experts_NK.new_empty(num_ranks, tiles) for _ in range(2))
    sizes = (N, K, num_ranks, num_experts // num_ranks, tiles)
    launch(_count_kernel, (tiles,), experts_NK, tokens, pairs, *sizes, constants=tile, num_warps=warps)
    starts = (tokens.flatten().cumsum(0) - tokens.flatten()).view_as(tokens)
    order, inverse = experts_NK.new_full((N * min(K, num_ranks),), -1), torch.empty_like(experts_NK)
    launch(
        _line_up_kernel, (tiles,), experts_NK, starts, order, inverse, *sizes, constants=tile, num_warps=warps
    )
    return order, inverse, torch.stack([tokens.sum(1), pairs.sum(1)], 1)


def _spread(x_ND: Tensor, order_Q: Tensor, inverse_NK: Tensor) -> Tensor:
    (Q,), D = order_Q.shape, x_ND.size(1)
    out = x_ND.new_empty(Q, D)
    tile, warps = row_tile(D)
    launch(
        _spread_kernel, (ceil_div(Q, tile["BLOCK_N"]),), x_ND, order_Q, None, None, out, None, Q,
        inverse_NK.size(1), D,
        constants={"GATED": False, **tile}, num_warps=warps, traffic=num_bytes(x_ND, out, order_Q),
    )  # fmt: skip
    return out


def _spread_gated(
    grad_ND: Tensor, y_QD: Tensor, gates_NK: Tensor, order_Q: Tensor, inverse_NK: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of y and of the gates from that of the combined rows."""
    out, grad_gates = torch.empty_like(y_QD), torch.empty_like(gates_NK)
    Q, D = y_QD.shape
    tile, warps = row_tile(D)
    launch(
        _spread_kernel, (ceil_div(Q, tile["BLOCK_N"]),), grad_ND, order_Q, gates_NK, y_QD, out, grad_gates,
        Q, gates_NK.size(1), D, constants={"GATED": True, **tile}, num_warps=warps,
    )  # fmt: skip
    return out, grad_gates


def _collect(y_QD: Tensor, gates_NK: Tensor | None, order_Q: Tensor, inverse_NK: Tensor) -> Tensor:
    (N, K), D = inverse_NK.shape, y_QD.size(1)
    out = y_QD.new_empty(N, D)
    tile, warps = row_tile(D)
    launch(
        _collect_kernel, (ceil_div(N, tile["BLOCK_N"]),), y_QD, inverse_NK, gates_NK, out, N, K, D,
        constants={"GATED": gates_NK is not None, **tile}, num_warps=warps,
    )  # fmt: skip
    return out


_op_line_up = custom_op("hybridtrain::sort_by_destination", _line_up, mutates_args=())
_op_permute = custom_op("hybridtrain::permute", _spread, mutates_args=())
_op_combine = custom_op("hybridtrain::combine", _collect, mutates_args=())
_op_combine_backward = custom_op("hybridtrain::combine_backward", _spread_gated, mutates_args=())


@_op_line_up.register_fake
def _(experts_NK: Tensor, num_experts: int, num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    order = experts_NK.new_empty(experts_NK.size(0) * min(experts_NK.size(1), num_ranks))
    return order, torch.empty_like(experts_NK), experts_NK.new_empty(num_ranks, 2)


@_op_permute.register_fake
def _(x_ND: Tensor, order_Q: Tensor, inverse_NK: Tensor) -> Tensor:
    return x_ND.new_empty(order_Q.size(0), x_ND.size(1))


@_op_combine.register_fake
def _(y_QD: Tensor, gates_NK: Tensor | None, order_Q: Tensor, inverse_NK: Tensor) -> Tensor:
    return y_QD.new_empty(inverse_NK.size(0), y_QD.size(1))


@_op_combine_backward.register_fake
def _(
    grad_ND: Tensor, y_QD: Tensor, gates_NK: Tensor, order_Q: Tensor, inverse_NK: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y_QD), torch.empty_like(gates_NK)


def _setup_permute(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gradients_permute(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _op_combine(grad.contiguous(), None, *ctx.saved_tensors), None, None


def _setup_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients_combine(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y_QD, gates_NK, order_Q, inverse_NK = ctx.saved_tensors
    if gates_NK is None:
        return _op_permute(grad.contiguous(), order_Q, inverse_NK), None, None, None
    return *_op_combine_backward(grad.contiguous(), y_QD, gates_NK, order_Q, inverse_NK), None, None


_op_permute.register_autograd(_gradients_permute, setup_context=_setup_permute)
_op_combine.register_autograd(_gradients_combine, setup_context=_setup_combine)


def sort_by_destination(
    experts_NK: Tensor, num_experts: int, num_ranks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As reference.sort_by_destination, for int64 experts; nothing waits for the counts."""
    out: tuple[Tensor, Tensor, Tensor] = _op_line_up(experts_NK.contiguous(), num_experts, num_ranks)
    return out


def permute(x_ND: Tensor, order_Q: Tensor, inverse_NK: Tensor) -> Tensor:
    """Row q of the result is the token of the pair that stands there, or zero: [Q, D]."""
    out: Tensor = _op_permute(x_ND.contiguous(), order_Q, inverse_NK)
    return out


def combine(y_QD: Tensor, gates_NK: Tensor | None, order_Q: Tensor, inverse_NK: Tensor) -> Tensor:
    """Each token's sum over its pairs, weighted by the gates where there are any, k rising: [N, D] in the
    dtype of `y_QD`.
    """
    gates_NK = gates_NK.contiguous() if gates_NK is not None else None
    out: Tensor = _op_combine(y_QD.contiguous(), gates_NK, order_Q, inverse_NK)
    return out


def pad_groups(
    order_P: Tensor, inverse_NK: Tensor, counts_E: Tensor, multiple: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(order_Q, inverse_NK, counts_E) with every expert's rows filled up to a multiple; Q depends on shapes
    alone, not on counts.

    What is left over of Q counts to the last expert.
    """
    E, P = len(counts_E), len(order_P)
    padded_E = (counts_E + multiple - 1) // multiple * multiple
    shift_E = (padded_E.cumsum(0) - padded_E) - (counts_E.cumsum(0) - counts_E)
    expert_P = torch.repeat_interleave(torch.arange(E, device=counts_E.device), counts_E, output_size=P)
    places_P = torch.arange(P, device=counts_E.device) + shift_E[expert_P]
    Q = ceil_div(P + E * (multiple - 1), multiple) * multiple
    order_Q = order_P.new_full((Q,), -1).index_copy_(0, places_P, order_P)
    padded_E = padded_E.clone()
    padded_E[-1] += Q - padded_E.sum()
    return order_Q, places_P[inverse_NK], padded_E


def cases() -> Iterator[Case]:
    """Eight experts a token, at a width of 4096; of 256 experts on 64 ranks."""
    N, K, D = 8192, 8, 4096
    x = torch.empty(N, D, dtype=torch.bfloat16, device="meta")
    y, gates = x.new_empty(N * K, D), x.new_empty(N, K, dtype=torch.float32)
    order, inverse = x.new_empty(N * K, dtype=torch.int64), x.new_empty(N, K, dtype=torch.int64)
    shape, least = f"N={N} K={K} D={D}", num_bytes(x, y)
    yield Case("permute", f"permute {shape}", lambda: _spread(x, order, inverse), least)
    yield Case("permute", f"permute backward {shape}", lambda: _collect(y, None, order, inverse), least)
    yield Case("permute", f"combine {shape}", lambda: _collect(y, gates, order, inverse), least)
    back = lambda: _spread_gated(x, y, gates, order, inverse)  # noqa: E731
    yield Case("permute", f"combine backward {shape}", back, least + num_bytes(y))
    least = num_bytes(inverse, inverse, order)
    yield Case(
        "permute",
        f"destinations N={N} K={K} R=64",
        lambda: _line_up(inverse, 256, 64),
        least,
        0,
        "arithmetic",
    )
