"""Attention by blocks of queries against its definition by a mask of all pairs; of long sequences no tensor
has all pairs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybridtrain.kernels.document_attention import op, reference
from hybridtrain.kernels.document_attention.op import (
    STEP,
    Spans,
    document_attention,
    document_bounds,
    read_spans,
)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made while it is entered."""

    elements = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


def documents_at(tokens: int, *starts: list[int]) -> Tensor:
    begins = torch.zeros(len(starts), tokens, dtype=torch.int64)
    for row, places in zip(begins, starts, strict=True):
        row[places] = 1
    return begins.cumsum(1)


def _run(function: Any, inputs: list[Tensor], *rest: Any) -> list[Tensor]:
    parts = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*parts, *rest)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad((out * weights).sum(), parts)]


TOKENS = 5 * STEP + 7
DOCUMENTS = {
    "one": None,
    "packed": documents_at(TOKENS, [1, 2, STEP, 3 * STEP - 1, 3 * STEP + 20], [STEP - 1, 2 * STEP + 5]),
    "a token each": torch.arange(TOKENS).expand(2, TOKENS),
}


@pytest.mark.parametrize("kind", list(DOCUMENTS))
@pytest.mark.parametrize(("first", "queries"), [(0, TOKENS), (STEP + 3, 2 * STEP), (TOKENS - 5, 5)])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_blocks_equal_the_definition(
    kind: str, first: int, queries: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole sequences and parts of them, as under cp: the output and every gradient."""
    monkeypatch.setattr(op, "_MOST_QUERIES", STEP)
    documents, keys = DOCUMENTS[kind], first + queries
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, queries, 4, 8), (2, keys, kv_heads, 8), (2, keys, kv_heads, 8))
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    mine = _run(document_attention, inputs, documents, read_spans(documents, TOKENS), first)
    plain = _run(reference.document_attention, inputs, documents, first)
    exact = _run(reference.document_attention, [x.double() for x in inputs], documents, first)
    for a, b, c in zip(mine, plain, exact, strict=True):
        assert (a - c).abs().max() <= 3 * (b - c).abs().max() + 1e-6 * c.abs().max()


def test_gradients_of_keys_are_added_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks read a key: a sum in bfloat16 would lose what is small beside it."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 16 * STEP, 1, 8, generator=generator, dtype=torch.bfloat16) for _ in range(3)]
    exact = _run(reference.document_attention, [x.double() for x in inputs], None)
    off = []
    for most in (STEP, 16 * STEP):
        monkeypatch.setattr(op, "_MOST_QUERIES", most)
        mine = _run(document_attention, inputs, None, read_spans(None, 16 * STEP))
        off.append([float(((a - b).norm() / b.norm()).detach()) for a, b in zip(mine, exact, strict=True)])
    assert all(blocks < 1.5 * whole + 1e-3 for blocks, whole in zip(*off, strict=True)), off


def test_no_tensor_has_all_pairs_of_a_long_sequence() -> None:
    tokens = 8192
    documents = documents_at(tokens, [700, 3000, 3001])
    inputs = [torch.randn(1, tokens, 1, 2) for _ in range(3)]
    with Largest() as largest:
        _run(document_attention, inputs, documents, read_spans(documents, tokens))
    assert largest.elements <= 1 << 22 == tokens * tokens / 16


def test_blocks_begin_where_documents_let_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a document costs does not depend on how many stand before it."""
    documents = documents_at(4096, list(range(0, 4096, 128)))
    spans, q = read_spans(documents, 4096), torch.empty(1, 4096, 1, 8)
    read = [block.mask_B1QK.size(-1) for block in op._blocks(q, documents, spans.reach, 0)]
    assert max(read) <= op._MOST_QUERIES + 128


def test_spans_are_read_once_and_bounds_are_of_all_sequences() -> None:
    documents = documents_at(3 * STEP, [5, STEP + 1], [2 * STEP])
    assert read_spans(documents, 3 * STEP) == Spans((0, 0, STEP + 1))  # the least of both
    assert document_bounds(documents).tolist() == [0, 5, STEP + 1, 3 * STEP, 5 * STEP, 6 * STEP]
    assert document_bounds(torch.zeros(2, 7, dtype=torch.int64)).tolist() == [0, 7, 14]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_packed_documents_on_a_gpu_equal_the_definition() -> None:
    """Nobody has run this yet."""
    generator = torch.Generator().manual_seed(0)
    documents = documents_at(TOKENS, [5, STEP], [7]).cuda()
    inputs = [torch.randn(2, TOKENS, heads, 64, generator=generator).cuda().bfloat16() for heads in (4, 2, 2)]
    spans = read_spans(documents, TOKENS)
    assert spans.bounds is not None
    mine = _run(document_attention, inputs, documents, spans)
    exact = _run(reference.document_attention, [x.double() for x in inputs], documents)
    for a, b in zip(mine, exact, strict=True):
        assert float((a - b).norm() / b.norm()) < 2e-2
