from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from hybridtrain.data.batches import Batch, BatchLoader, BatchShare, EvalBatches
from hybridtrain.data.prepare import prepare
from hybridtrain.data.shards import Split, TokenDataset
from hybridtrain.errors import DataError

G, T = 48, 16


@pytest.fixture(scope="module")
def train(folder: Path) -> Split:
    return TokenDataset.open(folder, verify=True).split("train")


@pytest.fixture(scope="module")
def validation(folder: Path) -> Split:
    return TokenDataset.open(folder, verify=True).split("validation")


def joined(parts: list[Batch]) -> Batch:
    """The ranks' parts side by side."""
    return Batch(
        *(
            torch.cat([getattr(part, name) for part in parts], dim=1)
            for name in ("tokens", "targets", "starts")
        )
    )


def same(first: Batch, second: Batch) -> bool:
    return all(
        torch.equal(getattr(first, name), getattr(second, name)) for name in ("tokens", "targets", "starts")
    )


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_the_global_batch_is_the_same_at_every_layout(train: Split, micro_batches: int) -> None:
    for step in (0, 1, 57):
        whole = BatchLoader(train, T, BatchShare(G), seed=5).load(step)
        assert (whole.tokens.shape, whole.tokens.dtype, whole.starts.dtype) == (
            (1, G, T),
            torch.int64,
            torch.bool,
        )
        for dp_size in (1, 2, 3, 4):
            loaders = [
                BatchLoader(train, T, BatchShare(G, micro_batches, rank, dp_size), seed=5)
                for rank in range(dp_size)
            ]
            batch = joined([loader.load(step) for loader in loaders])
            assert batch.tokens.shape == (micro_batches, G // micro_batches, T)
            flat = Batch(*(getattr(batch, n).reshape(1, G, T) for n in ("tokens", "targets", "starts")))
            assert same(flat, whole)


def test_windows_are_cut_from_the_split(train: Split) -> None:
    loader = BatchLoader(train, T, BatchShare(8, 2), seed=0)
    tokens, starts = (torch.from_numpy(x) for x in train.window(0, train.num_tokens))
    count = loader.num_windows
    assert count == (train.num_tokens - 1) // T
    windows = {tuple(tokens[w * T : w * T + T + 1].tolist()): w for w in range(count)}
    seen: list[int] = []
    for step in range(-(-count // 8)):
        batch = loader.load(step)
        for place in range(8):
            row_T, targets_T, starts_T = (
                x.reshape(8, T)[place] for x in (batch.tokens, batch.targets, batch.starts)
            )
            window = windows[(*row_T.tolist(), int(targets_T[-1]))]
            assert torch.equal(targets_T[:-1], row_T[1:])
            assert torch.equal(starts_T, starts[window * T : window * T + T])
            seen.append(window)
    assert sorted(seen[:count]) == list(range(count))


def test_steps_are_stateless_and_seeds_differ(train: Split) -> None:
    loader = BatchLoader(train, T, BatchShare(G, 2, 0, 2), seed=1)
    late = loader.load(9)
    assert not same(loader.load(3), late)
    assert same(loader.load(9), late)
    assert not same(BatchLoader(train, T, BatchShare(G, 2, 0, 2), seed=2).load(9), late)


def test_too_little_text_is_refused(train: Split) -> None:
    size = train.num_tokens
    assert BatchLoader(train, size - 1, BatchShare(2), seed=0).load(0).tokens.shape == (1, 2, size - 1)
    with pytest.raises(
        DataError,
        match=f"the train split has {size} tokens, fewer than one window of seq_len={size} .* at most "
        f"{size - 1}",
    ):
        BatchLoader(train, size, BatchShare(2), seed=0)


def test_batches_that_do_not_divide_are_refused(train: Split) -> None:
    with pytest.raises(
        DataError,
        match="global batch of 10 sequences does not divide into 2 micro-batches on 3 data-parallel ranks; "
        "12 does",
    ):
        BatchLoader(train, T, BatchShare(10, 2, 0, 3), seed=0)
    with pytest.raises(DataError, match="global batch of 10 sequences does not divide"):
        EvalBatches(train, T, BatchShare(10, 1, 0, 4))


@pytest.mark.parametrize("seq_len", [16, 37])
def test_evaluation_covers_every_target_once(validation: Split, seq_len: int) -> None:
    tokens, starts = (torch.from_numpy(x) for x in validation.window(0, validation.num_tokens))
    whole = list(EvalBatches(validation, seq_len, BatchShare(24)))
    assert (
        len(whole)
        == len(EvalBatches(validation, seq_len, BatchShare(24)))
        == math.ceil((len(tokens) - 1) / (24 * seq_len))
    )
    targets = torch.cat([batch.targets.reshape(-1) for batch in whole])
    inputs = torch.cat([batch.tokens.reshape(-1) for batch in whole])
    marks = torch.cat([batch.starts.reshape(-1) for batch in whole])
    count = len(tokens) - 1
    assert torch.equal(targets[targets != -100], tokens[1:])
    assert torch.equal(inputs[:count], tokens[:-1])
    assert torch.equal(marks[:count], starts[:-1])
    assert (targets[count:] == -100).all()
    assert (inputs[count:] == validation.separator_id).all()
    assert marks[count:].all()
    for dp_size in (2, 3, 4):
        for micro_batches in (1, 2):
            parts = [
                list(EvalBatches(validation, seq_len, BatchShare(24, micro_batches, rank, dp_size)))
                for rank in range(dp_size)
            ]
            assert {len(part) for part in parts} == {len(whole)}
            for number, batch in enumerate(whole):
                got = joined([part[number] for part in parts])
                assert torch.equal(got.targets.reshape(-1), batch.targets.reshape(-1))
                assert torch.equal(got.tokens.reshape(-1), batch.tokens.reshape(-1))


def test_evaluation_can_be_limited_and_repeated(validation: Split) -> None:
    limited = EvalBatches(validation, T, BatchShare(4), limit=2)
    assert len(limited) == 2
    for _ in range(2):
        assert all(
            same(a, b) for a, b in zip(limited, EvalBatches(validation, T, BatchShare(4)), strict=False)
        )
        assert len(list(limited)) == 2
    assert len(EvalBatches(validation, T, BatchShare(4), limit=10**6)) == len(
        EvalBatches(validation, T, BatchShare(4))
    )


def test_an_empty_validation_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "only one text"}), encoding="utf-8")
    prepare(
        [tmp_path / "one.jsonl"], tmp_path / "out", vocab_size=257, validation_fraction=0.0, progress=False
    )
    empty = TokenDataset.open(tmp_path / "out", verify=True).split("validation")
    with pytest.raises(
        DataError, match=r"the validation split has 0 tokens and nothing to predict; .*--validation FILE"
    ):
        EvalBatches(empty, T, BatchShare(4))
