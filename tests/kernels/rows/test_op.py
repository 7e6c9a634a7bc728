"""The segment sum by torch, bit for bit the definition's, and the gather with its gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridtrain.kernels.rows import reference
from hybridtrain.kernels.rows.op import _by_bags, row_gather, segment_sum
from hybridtrain.kernels.testing import check


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    N=st.integers(0, 40),
    S=st.integers(1, 12),
    D=st.sampled_from([1, 3, 8, 33, 80]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    in_order=st.booleans(),
)
def test_adds_in_the_order_of_the_definition(seed, N, S, D, dtype, in_order):
    generator = torch.Generator().manual_seed(seed)
    values = (
        torch.randn(N, D, generator=generator)
        .mul(10 ** torch.empty(N, 1).uniform_(-3, 3, generator=generator))
        .to(dtype)
    )
    segment = torch.randint(0, S, (N,), generator=generator)
    segment = segment.sort().values if in_order else segment
    out = segment_sum(values, segment, S)
    assert out.dtype == dtype
    assert torch.equal(out, reference.segment_sum(values, segment, S))


def test_order_of_appearance_decides_the_rounding():
    values = torch.tensor([[1e8], [1.0], [-1e8], [5.0]])
    assert segment_sum(values, torch.tensor([1, 1, 1, 0]), 3).tolist() == [[5.0], [0.0], [0.0]]
    assert segment_sum(values[[0, 2, 1, 3]], torch.tensor([1, 1, 1, 0]), 3).tolist() == [[5.0], [1.0], [0.0]]


def test_same_bits_at_any_thread_count():
    values, segment = torch.randn(20_000, 33), torch.randint(0, 500, (20_000,))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(segment_sum(values, segment, 500))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_takes_slices_of_a_larger_tensor():
    values, segment = torch.randn(10, 20), torch.randint(0, 4, (10,))
    assert torch.equal(
        segment_sum(values[:, 3:9], segment, 4), segment_sum(values[:, 3:9].clone(), segment, 4)
    )


def test_no_segments_and_no_rows():
    assert segment_sum(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), 0).shape == (0, 5)
    assert torch.equal(
        segment_sum(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), 2), torch.zeros(2, 5)
    )


@pytest.mark.parametrize("segment", [[0, 2], [-1, 0]])
def test_refuses_segments_out_of_range(segment):
    with pytest.raises(RuntimeError, match="out of"):
        segment_sum(torch.ones(2, 3), torch.tensor(segment), 2)


@pytest.mark.parametrize(("N", "S"), [(0, 3), (1, 1), (500, 40), (500, 900)])
def test_the_formulation_for_cuda_adds_in_the_same_order(N, S):
    values, segment = torch.randn(N, 33), torch.randint(0, S, (N,))
    assert torch.equal(_by_bags(values, segment, S), reference.segment_sum(values, segment, S))


def test_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"values \[2, 3\] and segment \[3\] must be \[N, D\] and \[N\]"):
        segment_sum(torch.ones(2, 3), torch.tensor([0, 1, 1]), 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_adds_in_the_same_order():
    values, segment = torch.randn(3000, 80), torch.randint(0, 200, (3000,))
    assert torch.equal(
        segment_sum(values.cuda(), segment.cuda(), 200).cpu(), segment_sum(values, segment, 200)
    )


def test_gathers_any_shape_of_rows_with_the_gradient() -> None:
    rows = torch.randint(30, (3, 5, 2))
    check(row_gather, reference.row_gather, [torch.randn(40, 24)], rows)
