"""Context parallelism against whole sequences: attention and the Engram layer's convolution, their outputs
and every gradient.
"""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from hybridtrain.kernels.engram.op import ConvRule, short_conv
from hybridtrain.model import common as context_module
from hybridtrain.model.common import make_context
from hybridtrain.model.exchanges import attend, position_in_expert
from hybridtrain.parallel.context import ContextParallel
from tests.parallel.groups import mesh_here
from tests.ranks import run_on_ranks

SEQUENCES, TOKENS, HEADS, KV_HEADS, WIDTH = 2, 32, 4, 2, 8
TAPS, DILATION = 2, 3


def documents(kind: str) -> Tensor:
    starts = torch.zeros(SEQUENCES, TOKENS, dtype=torch.long)
    if kind == "packed":  # borders inside chunks and on them, and documents of one token
        starts[0, [3, 4, 16, 30]] = 1
        starts[1, [8, 9, 10, 24]] = 1
    return starts.cumsum(1)


def check(kind: str) -> None:
    mesh = mesh_here(cp=torch.distributed.get_world_size())
    context = ContextParallel(mesh.cp, TOKENS)
    places, docs = context.positions(), documents(kind)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def here(whole: Tensor) -> Tensor:
        return whole.detach()[:, places].clone().requires_grad_()

    q, k, v = (
        randn(SEQUENCES, TOKENS, heads, WIDTH).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    grad = randn(SEQUENCES, TOKENS, HEADS, WIDTH)
    expected = attend(q, k, v, make_context(docs, TOKENS, WIDTH, 1e4, q.device))
    expected.backward(grad)
    for masked in (TOKENS, TOKENS - 1):  # with a mask of all pairs, and as sequences too long for it
        mine = [here(x) for x in (q, k, v)]
        with patch.object(context_module, "MASKED_TOKENS", masked):
            here_context = make_context(docs, len(places), WIDTH, 1e4, q.device, places)
        assert (here_context.mask_B1TT is None) == (masked < TOKENS)
        out = context.attend(*mine, here_context)
        out.backward(grad[:, places])
        torch.testing.assert_close(out, expected[:, places])
        for part, whole in zip(mine, (q, k, v), strict=True):
            torch.testing.assert_close(part.grad, whole.grad[:, places])

    x, grad = randn(SEQUENCES, TOKENS, 6).requires_grad_(), randn(SEQUENCES, TOKENS, 6)
    weights = [randn(6).requires_grad_(), randn(TAPS, 6).requires_grad_()]
    expected = short_conv(x, *weights, docs, ConvRule(DILATION, 1e-6))
    expected.backward(grad)
    part, own = here(x), [w.detach().clone().requires_grad_() for w in weights]
    out = context.convolve(part, *own, docs, ConvRule(DILATION, 1e-6))
    out.backward(grad[:, places])
    torch.testing.assert_close(out, expected[:, places])
    torch.testing.assert_close(part.grad, x.grad[:, places])
    for mine, whole in zip(own, weights, strict=True):
        torch.distributed.all_reduce(mine.grad)
        torch.testing.assert_close(mine.grad, whole.grad)


def check_places() -> None:
    """Lines before experts are of whole sequences."""
    mesh = mesh_here(cp=torch.distributed.get_world_size())
    context = ContextParallel(mesh.cp, TOKENS)
    experts = torch.randint(5, (SEQUENCES, TOKENS, 1), generator=torch.Generator().manual_seed(0))
    here = context.positions()
    assert torch.equal(context.position_in_expert(experts[:, here]), position_in_expert(experts)[:, here])


def check_bytes_and_balance() -> None:
    mesh = mesh_here(cp=torch.distributed.get_world_size())
    context = ContextParallel(mesh.cp, TOKENS)
    local, size = TOKENS // mesh.cp.size, mesh.cp.size
    q = torch.randn(SEQUENCES, local, HEADS, WIDTH)
    kv = [torch.randn(SEQUENCES, local, KV_HEADS, WIDTH, requires_grad=True) for _ in range(2)]
    context.attend(
        q, *kv, make_context(documents("one"), local, WIDTH, 1e4, q.device, context.positions())
    ).sum().backward()
    payload = 2 * SEQUENCES * local * KV_HEADS * WIDTH * 4  # keys and values of this rank
    assert mesh.traffic.entries() == {
        ("cp", "all_gather"): (1, (size - 1) * payload),
        ("cp", "reduce_scatter"): (1, (size - 1) * payload),
    }
    keys_read = sum(int(p) + 1 for p in context.positions())
    assert keys_read * size == TOKENS * (TOKENS + 1) // 2  # every rank reads the same number of keys


def check_all() -> None:
    for kind in ("one", "packed"):
        check(kind)
    check_places()
    check_bytes_and_balance()


@pytest.mark.parametrize("nproc", [2, 4])
def test_parts_of_sequences_are_like_whole_ones(nproc: int) -> None:
    run_on_ranks(check_all, nproc)
