"""Row ids of all orders, heads and Engram layers in one pass, in Triton; equals reference.py bit for bit.

N = B*T tokens, L Engram layers, O orders, K heads, S = O*K slots, J the longest order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from hybridtrain.kernels.engram_hash.addressing import Addressing
from hybridtrain.kernels.engram_hash.op import _tables
from hybridtrain.kernels.launch import Case, ceil_div, launch, num_bytes

BLOCK_N = 128


@triton.jit
def _hash_kernel(
    tokens_ptr, starts_ptr, compression_ptr, multipliers_ptr, primes_ptr, offsets_ptr, out_ptr, N, T, L, K,
    pad,
    ORDERS: tl.constexpr, LONGEST: tl.constexpr, SLOTS: tl.constexpr, DOCUMENT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """ORDERS has bit n set where order n is used."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    layer = tl.program_id(1)
    heads = tl.arange(0, BLOCK_K)
    inside = n < N
    t = n % T
    visible = inside
    mix = tl.zeros([BLOCK_N], dtype=tl.int64)
    slot = layer * SLOTS
    for j in tl.static_range(LONGEST):
        visible = visible & (t >= j)
        token = tl.load(tokens_ptr + n - j, mask=visible, other=0)
        gram = tl.where(visible, tl.load(compression_ptr + token, mask=visible, other=0), pad)
        mix = mix ^ (gram * tl.load(multipliers_ptr + layer * LONGEST + j))
        if DOCUMENT:
            visible = visible & (tl.load(starts_ptr + n - j, mask=visible, other=1) == 0)
        if (ORDERS >> (j + 1)) & 1:
            prime = tl.load(primes_ptr + slot + heads, mask=heads < K, other=1)[None, :]
            rest = mix[:, None] % prime
            rest = tl.where(rest < 0, rest + prime, rest)
            ids = rest + tl.load(offsets_ptr + slot + heads, mask=heads < K, other=0)[None, :]
            tl.store(
                out_ptr + n[:, None] * (L * SLOTS) + slot + heads[None, :],
                ids,
                mask=inside[:, None] & (heads < K)[None, :],
            )
            slot += K


def _forward(
    tokens: Tensor, starts: Tensor, compression: Tensor, multipliers_LJ: Tensor, primes_LOK: Tensor,
    offsets_LOK: Tensor,
    orders: list[int], pad: int, document: bool,
) -> Tensor:  # fmt: skip
    L, O, K = primes_LOK.shape  # noqa: E741
    N, T = tokens.numel(), tokens.size(-1)
    out = tokens.new_empty(*tokens.shape, L, O * K)
    launch(
        _hash_kernel, (ceil_div(N, BLOCK_N), L), tokens, starts, compression, multipliers_LJ, primes_LOK,
        offsets_LOK, out,
        N, T, L, K, pad,
        constants={
            "ORDERS": sum(1 << order for order in orders), "LONGEST": max(orders), "SLOTS": O * K,
            "DOCUMENT": document,
            "BLOCK_N": BLOCK_N, "BLOCK_K": triton.next_power_of_2(K),
        },
        num_warps=4, traffic=num_bytes(out) + L * num_bytes(tokens, starts) + L * max(orders) * 8 * N,
    )  # fmt: skip
    return out


_op = custom_op("hybridtrain::engram_hash", _forward, mutates_args=())


@_op.register_fake
def _(
    tokens: Tensor, starts: Tensor, compression: Tensor, multipliers_LJ: Tensor, primes_LOK: Tensor,
    offsets_LOK: Tensor,
    orders: list[int], pad: int, document: bool,
) -> Tensor:  # fmt: skip
    L, O, K = primes_LOK.shape  # noqa: E741
    return tokens.new_empty(*tokens.shape, L, O * K)


def row_ids(addressing: Addressing, tokens: Tensor, starts: Tensor) -> Tensor:
    """As op.row_ids; a token outside the vocabulary is not noticed, which would synchronise.

    Raises ValueError where the shapes differ.
    """
    if tokens.shape != starts.shape or tokens.ndim == 0:
        raise ValueError(
            f"tokens {list(tokens.shape)} and starts {list(starts.shape)} must have one shape [..., T]"
        )
    tables = _tables(addressing, tokens.device)
    document = addressing.boundary == "document"
    out: Tensor = _op(
        tokens.contiguous(),
        starts.contiguous(),
        *tables,
        list(addressing.orders),
        addressing.pad_id,
        document,
    )
    return out


def cases() -> Iterator[Case]:
    """Two Engram layers of three orders and eight heads, as in DeepSeek-V4.1-Flash."""
    tokens = torch.empty(16, 4096, dtype=torch.int64, device="meta")
    starts = tokens.new_empty(16, 4096, dtype=torch.bool)
    L, orders, K = 2, [2, 3, 4], 8
    tables = (
        tokens.new_empty(129_280),
        tokens.new_empty(L, 4),
        tokens.new_empty(L, 3, K),
        tokens.new_empty(L, 3, K),
    )
    least = num_bytes(tokens, starts) + tokens.numel() * L * len(orders) * K * 8
    run = lambda: _forward(tokens, starts, *tables, orders, 0, True)  # noqa: E731
    yield Case("engram_hash", "B=16 T=4096 L=2 S=24", run, least, bound="arithmetic")
