"""Attention over depth as a model would call it: by torch and by Triton, merged with the attention of a
sequence.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from hybridtrain.kernels.choose import Backends
from hybridtrain.kernels.depth_attention import reference
from hybridtrain.kernels.depth_attention.op import depth_attention, merge
from hybridtrain.kernels.testing import check

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.fixture(params=["torch", pytest.param("triton", marks=needs_triton)])
def how(request: pytest.FixtureRequest) -> Backends:
    return Backends({"depth_attention": request.param})


@pytest.mark.parametrize(("N", "H", "G", "S", "C"), [(1, 4, 2, 2, 60), (63, 6, 2, 9, 32), (3, 2, 1, 33, 100)])
def test_equals_the_definition(how: Backends, N: int, H: int, G: int, S: int, C: int) -> None:
    check(
        lambda *x: depth_attention(*x, backends=how),
        reference.depth_attention,
        [torch.randn(s) for s in ((N, H, C), (N, S, G, C), (N, S, G, C))],
        C**-0.5,
    )


def whole(q: Tensor, k: Tensor, v: Tensor, deep_k: Tensor, deep_v: Tensor) -> Tensor:
    """One softmax over the earlier tokens of a sequence [T, G, C] and the slots [T, S, G, C] of the token
    itself, written out.
    """
    R, out = q.size(1) // k.size(1), []
    for t in range(len(q)):
        keys, values = (
            torch.cat([seq[: t + 1], deep[t]]).repeat_interleave(R, 1)
            for seq, deep in ((k, deep_k), (v, deep_v))
        )
        weights = (torch.einsum("hc,shc->hs", q[t], keys) * 0.25).softmax(-1)
        out.append(torch.einsum("hs,shc->hc", weights, values))
    return torch.stack(out)


def merged(q: Tensor, k: Tensor, v: Tensor, deep_k: Tensor, deep_v: Tensor, how: Backends) -> Tensor:
    R = q.size(1) // k.size(1)
    scores = torch.einsum("thc,shc->ths", q, k.repeat_interleave(R, 1)) * 0.25
    scores = scores.masked_fill(torch.ones(len(q), len(q)).triu(1).bool()[:, None], -torch.inf)
    sequence = (
        torch.einsum("ths,shc->thc", scores.softmax(-1), v.repeat_interleave(R, 1)),
        scores.logsumexp(-1),
    )
    return merge(*sequence, *depth_attention(q, deep_k, deep_v, 0.25, how))[0]


def test_one_softmax_over_sequence_and_depth(how: Backends) -> None:
    shapes = ((9, 4, 16), (9, 2, 16), (9, 2, 16), (9, 5, 2, 16), (9, 5, 2, 16))
    check(lambda *x: merged(*x, how), whole, [torch.randn(shape) for shape in shapes])


def test_reads_slots_of_one_buffer_and_compiles(how: Backends) -> None:
    buffer, q = torch.randn(2, 9, 12, 2, 16), torch.randn(9, 4, 16)  # keys and values of up to 12 slots
    slots = buffer[0, :, :5], buffer[1, :, :5]
    plain = reference.depth_attention(q, *slots, 0.25)
    compiled = torch.compile(depth_attention, fullgraph=True, backend="aot_eager")
    for by in (depth_attention, compiled):
        for mine, wanted in zip(by(q, *slots, 0.25, how), plain, strict=True):
            torch.testing.assert_close(mine, wanted)
    assert depth_attention(q.to("meta"), *(x.to("meta") for x in slots), 0.25, how)[0].shape == q.shape


def test_half_precision_keeps_a_wide_log_sum_exp(how: Backends) -> None:
    q, k, v = (torch.randn(shape).bfloat16() for shape in ((3, 4, 16), (3, 5, 2, 16), (3, 5, 2, 16)))
    out, lse = depth_attention(q, k, v, 0.25, how)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


def test_refuses_what_does_not_fit(how: Backends) -> None:
    for k in (torch.randn(3, 5, 3, 8), torch.randn(3, 0, 2, 8), torch.randn(4, 5, 2, 8)):
        with pytest.raises(ValueError, match=r"q \[3, 4, 8\], k .* H a multiple of G"):
            depth_attention(torch.randn(3, 4, 8), k, k, 0.3, how)
