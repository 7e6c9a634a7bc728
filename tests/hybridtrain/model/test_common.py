"""Sequences too long for a mask of all pairs: the same attention without one, whole and in parts."""

from __future__ import annotations

import pytest
import torch

from hybridtrain.model import common as context
from hybridtrain.model.common import make_context
from hybridtrain.model.exchanges import attend


@pytest.mark.parametrize("starts", [[], [9, 10, 70]], ids=["one document", "several"])
def test_long_sequences_read_what_short_ones_do(starts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = 96
    begins = torch.zeros(2, tokens, dtype=torch.int64)
    begins[0, starts] = 1
    documents, here = begins.cumsum(1), torch.arange(tokens)
    q, k, v = torch.randn(3, 2, tokens, 2, 4, generator=torch.Generator().manual_seed(0))
    masked = make_context(documents, tokens, 4, 1e4, q.device)
    assert masked.spans is None
    assert make_context(documents, tokens, 4, 1e4, q.device, here).mask_B1TT is not None
    monkeypatch.setattr(context, "MASKED_TOKENS", tokens - 1)
    long, part = (
        make_context(documents, tokens, 4, 1e4, q.device),
        make_context(documents, tokens, 4, 1e4, q.device, here),
    )
    assert long.mask_B1TT is None
    assert part.mask_B1TT is None
    assert (long.spans is not None) == bool(
        starts
    )  # of one document each the plain causal attention makes no mask
    torch.testing.assert_close(attend(q, k, v, long), attend(q, k, v, masked))
    torch.testing.assert_close(attend(q, k, v, part), attend(q, k, v, masked))
    assert torch.equal(long.rotation_TR, masked.rotation_TR)
