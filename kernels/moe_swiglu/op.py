"""The experts from tokens to tokens: on the CPU expert by expert in threads of one core each, elsewhere by
grouped products (groups.py).

On the CPU nothing of [pairs, D] is gathered beforehand or weighted afterwards: an expert's tokens are
gathered, multiplied and weighted while they lie in a core's cache, and its hidden rows take the gates, which
are narrower. Sums have one order, whatever the number of threads.

N tokens, K choices per token, P = N*K pairs sorted by expert, E experts, D width, F hidden width, M pairs of
one expert. See reference.py for the definition.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridtrain.kernels.choose import TORCH, Backends
from hybridtrain.kernels.grouped_mlp.op import GROUPED_MLP

_silu, _silu_backward = torch.ops.aten.silu.out, torch.ops.aten.silu_backward.grad_input


class ExpertWeights(NamedTuple):
    """The weights of E SwiGLUs, in one dtype."""

    gate_EDF: Tensor
    up_EDF: Tensor
    down_EFD: Tensor


class Choice(NamedTuple):
    """The experts of each token, int64 in [0, E), and their gates.

    With `absent`, choices outside of [0, E) count nothing. `present` is how many are inside, for a caller who
    knows: without it grouped products take the others along as rows of zeros, since to ask would wait for the
    device.
    """

    experts_NK: Tensor
    gates_NK: Tensor
    absent: bool = False
    present: int | None = None


class Pairs(NamedTuple):
    """Pairs in stable order of their expert, all int64: `order_P[i]` is the flat pair n*K+k that stands i-th,
    `inverse_NK` says where each pair stands, `counts_E` how many each expert has."""

    order_P: Tensor
    inverse_NK: Tensor
    counts_E: Tensor


def sort_by_expert(experts_NK: Tensor, num_experts: int) -> Pairs:
    """The pairs of choices in [0, num_experts)."""
    sorted_P, order_P = torch.sort(experts_NK.reshape(-1), stable=True)
    inverse_P = torch.empty_like(order_P)
    inverse_P[order_P] = torch.arange(order_P.numel(), device=order_P.device)
    # not bincount: on a GPU the host waits for its least and its greatest number
    counts_E = torch.searchsorted(sorted_P, torch.arange(num_experts + 1, device=order_P.device)).diff()
    return Pairs(order_P, inverse_P.view(experts_NK.shape), counts_E)


def moe_swiglu(x_ND: Tensor, choice: Choice, weights: ExpertWeights, backends: Backends = TORCH) -> Tensor:
    """Each token's gated sum over its experts: [N, D] in the dtype of `x_ND`."""
    experts_NK, num_experts = choice.experts_NK, len(weights.gate_EDF)
    if choice.absent:  # sorted behind all others
        experts_NK = experts_NK.where((experts_NK >= 0) & (experts_NK < num_experts), num_experts)
    order_P, inverse_NK, counts = sort_by_expert(experts_NK, num_experts + choice.absent)
    pairs = Pairs(order_P, inverse_NK, counts[:num_experts])
    if _one_by_one(x_ND, weights, backends):
        return _moe_swiglu(x_ND, choice.gates_NK, order_P, inverse_NK, pairs.counts_E.tolist(), *weights)
    from hybridtrain.kernels.moe_swiglu.groups import by_groups

    return by_groups(x_ND, choice, pairs, weights, backends)


def _one_by_one(x_ND: Tensor, weights: ExpertWeights, backends: Backends) -> bool:
    """Whether experts are computed one after the other in each thread."""
    alike = x_ND.device.type == "cpu" and x_ND.dtype == weights.gate_EDF.dtype
    return alike and backends.of(GROUPED_MLP, x_ND) == "torch"


class _MoESwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        gates_NK: Tensor,
        order_P: Tensor,
        inverse_NK: Tensor,
        counts: list[int],
        *weights_EXX: Tensor,
    ) -> Tensor:
        order_P = order_P[: sum(counts)]
        inverse_NK = inverse_NK.clamp_max(sum(counts))  # absent: the row of zeros at the end
        token_P = order_P // inverse_NK.size(1)
        weight_P1 = gates_NK.reshape(-1)[order_P].to(x_ND.dtype)[:, None]
        gate_PF, up_PF = (x_ND.new_empty(len(order_P), weights_EXX[0].size(2)) for _ in range(2))
        y_PD = _with_zero_row(x_ND, len(order_P))

        per_pair = (token_P, weight_P1, gate_PF, up_PF, y_PD[:-1])
        tokens, weights, gates, ups, outs = (t.split(counts) for t in per_pair)
        w_gate, w_up, w_down = (w.unbind() for w in weights_EXX)

        def work(experts: Iterator[int]) -> None:
            widths = (x_ND.size(1), gate_PF.size(1))
            x_MD, hidden_MF = (x_ND.new_empty(max(counts), width) for width in widths)
            for e in experts:
                x = torch.index_select(x_ND, 0, tokens[e], out=x_MD[: counts[e]])
                torch.mm(x, w_gate[e], out=gates[e])
                torch.mm(x, w_up[e], out=ups[e])
                hidden = _silu(gates[e], out=hidden_MF[: counts[e]]).mul_(ups[e]).mul_(weights[e])
                torch.mm(hidden, w_down[e], out=outs[e])

        share_out(work, _largest_first(counts))
        ctx.counts = counts
        kept = (x_ND, gates_NK, inverse_NK, token_P, weight_P1, gate_PF, up_PF)
        ctx.save_for_backward(*kept, *weights_EXX)
        return F.embedding_bag(inverse_NK, y_PD, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gates_NK, inverse_NK, token_P, weight_P1, gate_PF, up_PF, *weights_EXX = ctx.saved_tensors
        counts, (width, hidden_width) = ctx.counts, weights_EXX[0].shape[1:]
        grad_x_PD, grad_weight_P = _with_zero_row(x_ND, len(token_P)), x_ND.new_zeros(len(token_P) + 1)
        grads_EXX = [torch.empty_like(w) for w in weights_EXX]

        per_pair = (token_P, weight_P1, gate_PF, up_PF, grad_x_PD[:-1], grad_weight_P[:-1])
        tokens, weights, gates, ups, grad_xs, grad_weights = (t.split(counts) for t in per_pair)
        w_gate_t, w_up_t, w_down_t = (w.mT.unbind() for w in weights_EXX)
        grads_gate, grads_up, grads_down = (w.unbind() for w in grads_EXX)

        def work(experts: Iterator[int]) -> None:
            x_MD, grad_MD = (x_ND.new_empty(max(counts), width) for _ in range(2))
            buffers = [x_ND.new_empty(max(counts), hidden_width) for _ in range(4)]
            for e in experts:
                silu_MF, hidden_MF, grad_MF, product_MF = (buffer[: counts[e]] for buffer in buffers)
                x = torch.index_select(x_ND, 0, tokens[e], out=x_MD[: counts[e]])
                grad_y = torch.index_select(grad_ND, 0, tokens[e], out=grad_MD[: counts[e]])
                silu = _silu(gates[e], out=silu_MF)
                hidden = torch.mul(silu, ups[e], out=hidden_MF)
                grad = torch.mm(grad_y, w_down_t[e], out=grad_MF)
                torch.sum(torch.mul(grad, hidden, out=product_MF), -1, out=grad_weights[e])
                torch.mm(hidden.mul_(weights[e]).t(), grad_y, out=grads_down[e])
                grad_up = silu.mul_(grad.mul_(weights[e]))
                grad_gate = _silu_backward(grad.mul_(ups[e]), gates[e], grad_input=grad)
                torch.mm(x.t(), grad_gate, out=grads_gate[e])
                torch.mm(x.t(), grad_up, out=grads_up[e])
                torch.mm(grad_gate, w_gate_t[e], out=grad_xs[e]).addmm_(grad_up, w_up_t[e])

        share_out(work, _largest_first(counts))
        grad_gates_NK = grad_weight_P[inverse_NK].to(gates_NK.dtype)
        grad_x_ND = F.embedding_bag(inverse_NK, grad_x_PD, mode="sum")
        return grad_x_ND, grad_gates_NK, None, None, None, *grads_EXX


def _with_zero_row(x_ND: Tensor, num_pairs: int) -> Tensor:
    """[P + 1, D], uninitialised but for zeros in the last row."""
    out = x_ND.new_empty(num_pairs + 1, x_ND.size(1))
    out[-1] = 0
    return out


def _largest_first(counts: list[int]) -> list[int]:
    """The experts in an order in which threads that take one after the other end together."""
    return sorted(range(len(counts)), key=lambda e: -counts[e])


_moe_swiglu: Callable[..., Tensor] = _MoESwiGLU.apply


def share_out(work: Callable[[Iterator[int]], None], experts: Sequence[int]) -> None:
    """`work(some)` on as many threads as torch has here, of one core each and without gradients; together
    they draw every expert once, in order. With fewer than two a thread, `work` runs once, in the caller's
    thread, on all its cores.

    A product of a few hundred rows is too small to be cut over cores: two cores make two of them side by side
    in less time than one after the other, and find in their own cache what they have just written.
    """
    left = iter(experts)
    num_threads = torch.get_num_threads()
    if num_threads == 1 or len(experts) < 2 * num_threads:
        work(left)
        return
    for running in [_pool(num_threads).submit(work, left) for _ in range(num_threads)]:
        running.result()


@cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    pool, all_started = ThreadPoolExecutor(num_threads, "experts"), Barrier(num_threads)
    cores = _cores_of(num_threads)

    def prepare() -> None:
        if cores:
            os.sched_setaffinity(0, {cores.pop()})  # this thread alone
        torch.set_num_threads(1)
        # a thread's first look makes the number its own; later it would see that of the threads to come
        torch.get_num_threads()
        torch.set_grad_enabled(False)
        all_started.wait()

    for started in [pool.submit(prepare) for _ in range(num_threads)]:
        started.result()
    torch.set_num_threads(num_threads)  # for the threads to come
    return pool


def _cores_of(num_threads: int) -> list[int]:
    """A core for each of the threads, where this process has exactly as many cores; else none: it is not
    known which are idle.

    Threads that sleep between two layers are often woken all on one core, and stay there as long as their
    work takes.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return cores if len(cores) == num_threads else []
