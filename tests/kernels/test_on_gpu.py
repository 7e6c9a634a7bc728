"""`make test-gpu`: the kernels compiled and run on the device, against their definitions. Nobody has run this yet."""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest
import torch

from hybridtrain.kernels.engram_hash.addressing import Addressing
from hybridtrain.kernels.engram_hash.reference import row_ids
from hybridtrain.kernels.segment_sum.reference import segment_sum

ready = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None and os.environ["TRITON_INTERPRET"] == "0"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ready, reason="needs a CUDA device, triton and TRITON_INTERPRET=0")]


def test_kernels_with_gradients() -> None:
    from hybridtrain.kernels.report import bench

    wrong = {c.op: error for c in bench.contests("cuda", scale=8) if (error := bench.errors(c, c.fused)) > bench.BFLOAT16_ERROR}
    assert wrong == {}


def test_hash_is_bit_exact() -> None:
    from hybridtrain.kernels.engram_hash import kernel

    addressing = Addressing.draw([1, 3], [2, 3], 3, 1000, np.arange(500) % 431, pad_id=7, seed=5)
    tokens, starts = torch.randint(0, 500, (2, 257)), torch.rand(2, 257) < 0.2
    out = kernel.row_ids(addressing, tokens.cuda(), starts.cuda())
    assert np.array_equal(out.cpu().numpy(), row_ids(addressing, tokens.numpy(), starts.numpy()))


def test_segment_sum_is_bit_exact() -> None:
    from hybridtrain.kernels.segment_sum import kernel

    values, segment = torch.randn(3000, 80), torch.randint(0, 200, (3000,))
    assert torch.equal(kernel.segment_sum(values.cuda(), segment.cuda(), 200).cpu(), segment_sum(values, segment, 200))
