"""The short convolution by torch, against the definition."""

from __future__ import annotations

import pytest
import torch

from hybridtrain.kernels.engram import op, reference
from hybridtrain.kernels.testing import check


@pytest.mark.parametrize("share", [None, 0.2, 1.0])  # of tokens that start a document
@pytest.mark.parametrize("tokens", [1, 2, 40])  # the taps reach over 9
def test_torch_equals_the_definition(tokens: int, share: float | None) -> None:
    documents = None if share is None else (torch.rand(2, tokens) < share).cumsum(1)
    inputs = [torch.randn(2, tokens, 12), torch.randn(12), torch.randn(4, 12)]
    check(op.short_conv, reference.short_conv, inputs, documents, 3, 1e-6)
