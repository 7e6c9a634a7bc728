"""Runs with a capacity and dispatch over nodes against one rank; what they tell; and how one ends that runs
out of memory.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridtrain.monitor.metrics import read_metrics
from hybridtrain.parallel import collectives
from hybridtrain.settings.tree import Settings
from tests.hybridtrain.test_parity import assert_same_curve, assert_same_state
from tests.ranks import RankFailure, run_on_ranks
from tests.training import ci_settings, train_here

CAPACITY = ("model.moe.capacity=1.0", "model.moe.num_shared=1")
HIERARCHICAL = 'parallel.dispatch="hierarchical"'
LAYOUTS = [
    (2, "parallel.tp=2", "parallel.ep=2", "parallel.node_size=1"),
    (4, "parallel.tp=2", "parallel.etp=2", "parallel.ep=2", "parallel.mem=1", "parallel.node_size=2"),
    (4, "parallel.tp=2", "parallel.cp=2", "parallel.ep=4", "parallel.mem=2", "parallel.node_size=2"),
]
MARKED = [LAYOUTS[0], *(pytest.param(layout, marks=pytest.mark.parity) for layout in LAYOUTS[1:])]


@pytest.mark.parametrize("layout", MARKED, ids=lambda layout: " ".join(map(str, layout)))
def test_the_same_pairs_are_dropped_at_every_layout(
    trained: Callable[..., Path], layout: tuple[int, ...]
) -> None:
    run, reference = trained(*layout, HIERARCHICAL, *CAPACITY), trained(1, *CAPACITY)
    assert_same_curve(run, reference)
    assert_same_state(run, reference)
    ours, theirs = ([line for line in read_metrics(folder) if "loss" in line] for folder in (run, reference))
    for line, other in zip(ours, theirs, strict=True):
        for layer in (1, 2):
            assert 0.05 < line[f"layers.{layer}/dropped_share"] < 0.9
            assert line[f"layers.{layer}/dropped_share"] == pytest.approx(
                other[f"layers.{layer}/dropped_share"], rel=2e-3
            )
    assert ours[0]["bytes/ep_inter"] > 0
    assert "bytes/ep" not in ours[0]


def train_and_listen(settings: Settings) -> str:
    """On a rank: train; what the terminal showed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        train_here(settings, resume=False)
    return out.getvalue()


def test_the_terminal_tells_the_way_of_tokens_and_what_was_dropped(ci_data: Path, tmp_path: Path) -> None:
    short = ["train.steps=2", "train.eval_batches=1", HIERARCHICAL, *CAPACITY]
    said, _ = run_on_ranks(
        train_and_listen,
        2,
        ci_settings(tmp_path / "two", ci_data, "parallel.ep=2", "parallel.node_size=1", *short),
    )
    assert "all-to-all over ep_inter=2, then ep_intra=1 " in said
    (line,) = [line for line in said.splitlines() if line.startswith("step      2  loss")]
    lines = [line for line in read_metrics(tmp_path / "two") if "loss" in line]
    share = (lines[1]["layers.1/dropped_share"] + lines[1]["layers.2/dropped_share"]) / 2
    assert line.endswith(f"  dropped {share:.2%}")
    (said,) = run_on_ranks(train_and_listen, 1, ci_settings(tmp_path / "one", ci_data, *short))
    assert "local (hierarchical: ep x etp is on one node)" in said


def train_without_memory(settings: Settings, rank: int) -> None:
    """On a rank: train; in the second step rank `rank` cannot allocate what a layer sends it."""
    real, seen = collectives.launch_all_to_all, 0

    def begin(x: torch.Tensor, *rest: Any) -> Any:
        nonlocal seen
        if torch.distributed.get_rank() == rank and x.is_floating_point() and rest[2].name == "ep":
            seen += 1
            # gates and tokens there, results back, their gradients, in two layers or micro-batches: the first
            # again
            if seen == 13:
                torch.empty(1 << 46)
        return real(x, *rest)

    collectives.launch_all_to_all = begin  # type: ignore[assignment]
    train_here(settings, resume=False)


@pytest.mark.parametrize(
    "layout", [(2, "parallel.ep=2"), (4, "parallel.ep=2", "parallel.pp=2", "train.micro_batches=2")]
)
def test_a_rank_without_memory_for_its_tokens_names_them(
    ci_data: Path, tmp_path: Path, layout: tuple[int, ...]
) -> None:
    world, *overrides = layout
    settings = ci_settings(tmp_path / "run", ci_data, "train.steps=3", *map(str, overrides))
    # tokens of a rank in a micro-batch, two experts each
    even = f"{24 * 80 // 2 * 2 // settings.train.micro_batches:,}"
    with pytest.raises(RankFailure) as caught:
        run_on_ranks(train_without_memory, world, settings, 1)
    last = str(caught.value).strip().splitlines()[-1]
    assert last.startswith(
        "hybridtrain.errors.TrainingError: layers.1.feedforward: rank 1 ran out of memory in the exchange "
        "over ep: "
    )
    assert f"times the even share of {even}; bound it by model.moe.capacity " in last
