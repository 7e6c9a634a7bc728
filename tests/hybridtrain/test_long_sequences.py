"""A model on sequences too long for a mask of all pairs: what it computes with one, also where layers are run
again.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridtrain.model import common as context
from tests.training import assert_bitwise, ci_settings, make_data, traces

SMALL = (
    "train.global_batch=4",
    "train.seq_len=40",
    "train.micro_batches=2",
    'model.layers=["engram+attention+moe"]',
)


def test_losses_and_gradients_are_those_with_a_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data(tmp_path / "data")
    runs = [
        ci_settings(tmp_path, data, *SMALL, f"train.recompute={mode}")
        for mode in ("none", "full", "selective")
    ]
    (masked,) = traces(runs[:1], 2)
    monkeypatch.setattr(context, "MASKED_TOKENS", 39)
    plain, *again = traces(runs, 2)
    assert plain.losses == pytest.approx(masked.losses, rel=1e-6)
    for name, gradient in plain.gradients[0].items():
        whole = masked.gradients[0][name]
        assert float((gradient - whole).norm()) <= 1e-5 * float(whole.norm()) + 1e-9, name
    for other in again:
        assert_bitwise(other, plain)
