"""Which ways of taking the same batch give the same bits, and how far apart the others are
(docs/parallelism.md).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ranks import run_on_ranks
from tests.training import Trace, ci_settings, trace, traces

# without clipping: the norm is a sum over shards, whose order the layout decides
BATCH = ("train.global_batch=4", "optim.clip_norm=0", "model.moe.aux_weight=0.01", "model.moe.z_weight=0.001")


def whole(ranks: list[Trace]) -> Trace:
    """One trace of ranks that hold the same parameters and parts of the table."""
    table = torch.cat([rank.state["table"] for rank in ranks])
    return Trace(
        ranks[0].losses, ranks[0].statistics, ranks[0].gradients, ranks[0].state | {"table": table}, {}
    )


def assert_same_bits(ours: Trace, theirs: Trace) -> None:
    assert ours.losses == theirs.losses
    for mine, other in zip([*ours.gradients, ours.state], [*theirs.gradients, theirs.state], strict=True):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            assert torch.equal(value, other[name]), name


def relative(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The greatest distance of a gradient to its reference, by their norms."""
    return max(float((value - theirs[name]).norm() / theirs[name].norm()) for name, value in ours.items())


@pytest.mark.parametrize("nproc", [2, 4])
def test_micro_batches_of_one_rank_are_the_ranks_of_one_micro_batch(ci_data: Path, nproc: int) -> None:
    one = trace(ci_settings(Path("unused"), ci_data, *BATCH, f"train.micro_batches={nproc}"))
    many = run_on_ranks(trace, nproc, ci_settings(Path("unused"), ci_data, *BATCH))
    print(nproc, relative(whole(many).gradients[0], one.gradients[0]))
    assert_same_bits(whole(many), one)


def test_one_large_micro_batch_is_close_to_four_small_ones(ci_data: Path) -> None:
    large, small = traces(
        [ci_settings(Path("unused"), ci_data, *BATCH, f"train.micro_batches={m}") for m in (1, 4)], 1
    )
    print(relative(small.gradients[0], large.gradients[0]), small.losses, large.losses)
    assert 0 < relative(small.gradients[0], large.gradients[0]) < 1e-5
    assert small.losses == pytest.approx(large.losses, rel=1e-6)
