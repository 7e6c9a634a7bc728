"""Causal attention inside documents for long sequences, without a mask of all pairs.

Queries go block by block, each with the mask of its own rows, from the first key that any of them may read;
the backward pass makes the masks again. On a GPU in half precision the documents are packed instead, for
torch's flash attention, without any mask.

B sequences, T queries, S keys, H heads, C head width. See reference.py for the definition.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# torch.compiler.disable would import the compiler here, for seconds
from torch._compile import _disable_dynamo as uncompiled

from hybridtrain.kernels.choose import Op

DOCUMENT_ATTENTION = Op(
    "attention",
    "torch scaled_dot_product_attention",
    ("torch",),
    keeps=(
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    ),
    has_key=False,
)
STEP = 64  # the fewest queries of a block, and how finely `Spans.reach` knows where documents begin
_MOST_QUERIES = 512
_MASK_ELEMENTS = 1 << 22  # of a block, a sequence


@dataclass(frozen=True)
class Spans:
    """Where the documents of some sequences lie, as the host knows it: read once for all layers.

    `reach[i]` is the first key that the queries from place `i * STEP` on may read. `bounds` (int32) are the
    first tokens of all documents of all sequences, one behind the other, and the end; `longest` is the
    longest one. Both only on a GPU.
    """

    reach: tuple[int, ...]
    bounds: Tensor | None = None
    longest: int = 0


def read_spans(documents_BS: Tensor | None, tokens: int) -> Spans:
    """The spans of documents whose numbers rise along S; None: of `tokens` tokens, one document a sequence.

    Waits for the device: once, and on a GPU once more, since only the data know how many documents there are.
    """
    if documents_BS is None:
        return Spans((0,) * -(-tokens // STEP))
    documents_BS = documents_BS.contiguous()
    first = torch.searchsorted(documents_BS, documents_BS[:, ::STEP].contiguous()).amin(0)
    if documents_BS.device.type != "cuda":
        return Spans(tuple(first.tolist()))
    bounds = document_bounds(documents_BS)
    *reach, longest = torch.cat([first, bounds.diff().amax()[None]]).tolist()
    return Spans(tuple(reach), bounds.to(torch.int32), longest)


def document_bounds(documents_BS: Tensor) -> Tensor:
    """int64 [documents + 1]: where each document begins among the tokens of all sequences, one behind the
    other, and their end.
    """
    begins = F.pad(documents_BS.diff() != 0, (1, 0), value=True)  # and every sequence
    return F.pad(begins.flatten().nonzero().flatten(), (0, 1), value=documents_BS.numel())


@uncompiled
def document_attention(
    q_BTHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, documents_BS: Tensor | None, spans: Spans, first: int = 0
) -> Tensor:
    """[B, T, H, C]: softmax attention of the tokens `first` to `first + T - 1` of each sequence; k and v may
    have fewer heads.

    `documents_BS` numbers the documents of a sequence, rising; None: one each. `spans` are theirs, or those
    of more tokens.
    """
    if spans.bounds is not None and q_BTHC.shape[:2] == k_BSHC.shape[:2] and _packs(q_BTHC):
        return _packed(q_BTHC, k_BSHC, v_BSHC, spans.bounds, spans.longest)
    out: Tensor = _Blocks.apply(q_BTHC, k_BSHC, v_BSHC, documents_BS, (spans.reach, first))  # type: ignore[no-untyped-call]
    return out


def _packs(x: Tensor) -> bool:
    """Whether torch's attention of packed sequences takes it: flash attention does, from Ampere on."""
    half = x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)
    return (
        half
        and x.size(-1) % 8 == 0
        and x.size(-1) <= 256
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def _packed(q_BTHC: Tensor, k_BTHC: Tensor, v_BTHC: Tensor, bounds: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # here: no run on a CPU needs it

    q, k, v = (x.flatten(0, 1) for x in (q_BTHC, k_BTHC, v_BTHC))
    gqa = k.size(1) != q.size(1)
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0), enable_gqa=gqa)
    assert isinstance(
        out, Tensor
    )  # for the type checker: a pair only where the sums of exponentials are asked for
    return out.view_as(q_BTHC)


@dataclass(frozen=True)
class _Block:
    """Some queries, the keys that any of them may read, and which of those each may."""

    queries: slice
    keys: slice
    mask_B1QK: Tensor

    def attend(self, q_BTHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor) -> Tensor:
        q, k, v = (
            x.transpose(1, 2) for x in (q_BTHC[:, self.queries], k_BSHC[:, self.keys], v_BSHC[:, self.keys])
        )
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask_B1QK, enable_gqa=k.size(1) != q.size(1)
        )
        return out.transpose(1, 2)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTHC: Tensor,
        k_BSHC: Tensor,
        v_BSHC: Tensor,
        documents_BS: Tensor | None,
        place: tuple[tuple[int, ...], int],
    ) -> Tensor:
        ctx.save_for_backward(q_BTHC, k_BSHC, v_BSHC, documents_BS)
        ctx.place = place
        out = torch.empty_like(q_BTHC)
        for block in _blocks(q_BTHC, documents_BS, *place):
            out[:, block.queries] = block.attend(q_BTHC, k_BSHC, v_BSHC)
        return out

    @staticmethod
    def backward(ctx: Any, grad_BTHC: Tensor) -> tuple[Tensor | None, ...]:
        """Keys and values are read by many blocks: their gradients are added up in float32."""
        *inputs, documents_BS = ctx.saved_tensors
        q, k, v = (x.detach().requires_grad_() for x in inputs)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (
            torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v)
        )
        for block in _blocks(q, documents_BS, *ctx.place):
            parts = [
                x.detach().requires_grad_() for x in (q[:, block.queries], k[:, block.keys], v[:, block.keys])
            ]
            whole = _Block(slice(None), slice(None), block.mask_B1QK)
            with torch.enable_grad():
                out = whole.attend(*parts)
            of_q, of_k, of_v = torch.autograd.grad(out, parts, grad_BTHC[:, block.queries])
            grad_q[:, block.queries] = of_q
            grad_k[:, block.keys] += of_k
            grad_v[:, block.keys] += of_v
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _blocks(
    q_BTHC: Tensor, documents_BS: Tensor | None, reach: tuple[int, ...], first: int
) -> Iterator[_Block]:
    tokens, device = q_BTHC.size(1), q_BTHC.device
    start = 0
    while start < tokens:
        low = reach[(first + start) // STEP]
        size = max(STEP, min(_MOST_QUERIES, _MASK_ELEMENTS // (first + start + _MOST_QUERIES - low)))
        end = min(start + size, tokens)
        place_Q, place_K = (
            torch.arange(first + start, first + end, device=device),
            torch.arange(low, first + end, device=device),
        )
        mask = (place_Q[:, None] >= place_K)[None]
        if documents_BS is not None:
            mask = mask & (
                documents_BS[:, first + start : first + end, None] == documents_BS[:, None, low : first + end]
            )
        yield _Block(slice(start, end), slice(low, first + end), mask[:, None])
        start = end
