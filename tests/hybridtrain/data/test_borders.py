"""Layouts are compared on data with borders between documents: without one in a sequence, nothing that
crosses it would show.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hybridtrain.data.batches import BatchLoader, BatchShare
from hybridtrain.data.prepare import ensure_prepared
from hybridtrain.data.shards import TokenDataset
from hybridtrain.settings.load import load_settings
from tests.parity.cases import MODEL
from tests.training import CI


def with_a_border(folder: Path, seq_len: int, steps: int, batch: int) -> float:
    """The share of a run's training sequences inside of which a document starts."""
    loader = BatchLoader(TokenDataset.open(folder).split("train"), seq_len, BatchShare(batch), seed=0)
    starts_BT = np.concatenate([loader.load(step).starts[0].numpy() for step in range(steps)])
    assert len(starts_BT) == steps * batch
    return float(starts_BT[:, 1:].any(1).mean())


def test_most_sequences_of_the_preset_have_a_border(tmp_path: Path) -> None:
    settings = load_settings(CI, [f"data.path={tmp_path / 'data'}"])
    ensure_prepared(settings.data, progress=False)
    train = settings.train
    assert with_a_border(tmp_path / "data", train.seq_len, train.steps, train.global_batch) > 0.8


def test_most_sequences_of_the_parity_matrix_have_a_border(ci_data: Path) -> None:
    train = load_settings(CI, MODEL).train
    assert with_a_border(ci_data, train.seq_len, train.steps, train.global_batch) > 0.6
