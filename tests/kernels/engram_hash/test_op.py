from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridtrain.kernels.engram_hash import op, reference
from hybridtrain.kernels.engram_hash.addressing import Addressing, TableShape

VOCAB = 30
COMPRESSION = np.arange(VOCAB) // 2


def make(orders=(2, 3), boundary="document", **changes) -> Addressing:
    values = {
        "layers": [1, 4],
        "orders": orders,
        "heads": 2,
        "rows_per_head": 50,
        "compression": COMPRESSION,
        "pad_id": 3,
        "seed": 1,
    }
    values |= {"boundary": boundary, **changes}
    shape = TableShape(*(values.pop(key) for key in ("layers", "orders", "heads", "rows_per_head")))
    return Addressing.draw(shape, **values)


def assert_equal(addressing, tokens, starts) -> torch.Tensor:
    ids = op.row_ids(addressing, tokens, starts)
    T = tokens.shape[-1]
    expected = reference.row_ids(addressing, tokens.reshape(-1, T).numpy(), starts.reshape(-1, T).numpy())
    np.testing.assert_array_equal(ids.reshape(expected.shape).numpy(), expected)
    assert ids.shape == (*tokens.shape, len(addressing.layers), addressing.num_slots)
    assert ids.dtype == torch.int64
    assert ids.is_contiguous()
    assert int(ids.min()) >= 0
    assert int(ids.max()) < addressing.num_rows
    return ids


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lead=st.lists(st.integers(1, 3), max_size=2),
    T=st.integers(1, 12),
    share=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    orders=st.sampled_from([(2,), (1, 2), (2, 3), (2, 3, 4), (3, 5)]),
    boundary=st.sampled_from(["document", "stream"]),
)
def test_equals_the_definition(seed, lead, T, share, orders, boundary):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (*lead, T), generator=generator)
    starts = torch.rand((*lead, T), generator=generator) < share
    assert_equal(make(orders, boundary), tokens, starts)


def test_full_size_addressing_and_wrapping_multipliers():
    tokens, starts = torch.randint(0, VOCAB, (2, 40)), torch.rand(2, 40) < 0.1
    assert_equal(make((2, 3, 4), rows_per_head=16_000_000), tokens, starts)
    drawn = make()
    huge = Addressing(
        (1, 4), (2, 3), 2, np.full((2, 3), 2**63 - 1), drawn.primes, drawn.compression, 3, "document"
    )
    assert_equal(huge, tokens, starts)


def test_a_hand_computed_bigram():
    a = Addressing((0,), (2,), 1, np.array([[5, 7]]), np.array([[[11]]]), np.arange(10), 2, "document")
    ids = op.row_ids(a, torch.tensor([4, 9, 1]), torch.tensor([True, False, False]))
    assert ids.reshape(-1).tolist() == [(4 * 5 ^ 2 * 7) % 11, (9 * 5 ^ 4 * 7) % 11, (1 * 5 ^ 9 * 7) % 11]


def test_a_document_reads_the_same_rows_wherever_it_stands():
    a = make((2, 3, 4))
    document = torch.randint(0, VOCAB, (9,))
    first = torch.zeros(9, dtype=torch.bool)
    first[0] = True
    alone = op.row_ids(a, document, first)
    packed = op.row_ids(
        a,
        torch.cat([torch.randint(0, VOCAB, (6,)), document]),
        torch.cat([torch.zeros(6, dtype=torch.bool), first]),
    )
    assert torch.equal(packed[6:], alone)
    without_start = op.row_ids(a, document, torch.zeros(9, dtype=torch.bool))
    assert torch.equal(without_start, alone)  # the window's left edge bounds n-grams as a start does


def test_stream_runs_across_starts_and_ignores_them():
    a = make((2, 3), "stream")
    tokens = torch.randint(0, VOCAB, (2, 20))
    everywhere, nowhere = torch.ones(2, 20, dtype=torch.bool), torch.zeros(2, 20, dtype=torch.bool)
    assert torch.equal(op.row_ids(a, tokens, everywhere), op.row_ids(a, tokens, nowhere))
    assert not torch.equal(op.row_ids(make((2, 3)), tokens, everywhere), op.row_ids(a, tokens, everywhere))


def test_slots_of_one_layer_fall_in_that_layers_rows():
    a = make((2, 3))
    ids = op.row_ids(a, torch.randint(0, VOCAB, (200,)), torch.zeros(200, dtype=torch.bool)).reshape(
        200, 2, 2, 2
    )
    for index in np.ndindex(2, 2, 2):
        slot = ids[(slice(None), *index)]
        low = int(a.offsets[index])
        assert low <= int(slot.min())
        assert int(slot.max()) < low + int(a.primes[index])


def test_refuses_shapes_that_differ_and_unknown_tokens():
    with pytest.raises(ValueError, match=r"tokens \[2, 3\] and starts \[3\] must have one shape"):
        op.row_ids(make(), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool))
    for token in (VOCAB, -1):
        with pytest.raises(IndexError, match="out of range"):
            op.row_ids(make(), torch.tensor([token]), torch.tensor([True]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_equals_the_definition_on_cuda():
    a = make((2, 3, 4), rows_per_head=16_000_000)
    tokens, starts = torch.randint(0, VOCAB, (4, 60)), torch.rand(4, 60) < 0.1
    assert torch.equal(op.row_ids(a, tokens.cuda(), starts.cuda()).cpu(), op.row_ids(a, tokens, starts))
