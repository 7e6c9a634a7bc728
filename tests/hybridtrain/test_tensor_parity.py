"""Runs under tensor parallelism against one rank: losses, parameters, rows, row state, optimizer state and
validation.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybridtrain.checkpoint import read_info
from hybridtrain.monitor.metrics import read_metrics
from hybridtrain.run.generate import open_checkpoint
from hybridtrain.settings.load import parse_settings
from tests.hybridtrain.test_parity import assert_same_curve, assert_same_state
from tests.training import loss_curve, train_on

LAYOUTS = [
    (2, "parallel.tp=2", "parallel.ep=2", "parallel.mem=2"),
]
MORE = [  # five steps of such layouts are in the fast part of the parity matrix
    (4, "parallel.tp=4", "parallel.mem=4"),
    (4, "parallel.tp=2", "parallel.ep=2", "parallel.mem=1", "parallel.etp=2"),
    (
        4,
        "parallel.tp=2",
        "parallel.ep=4",
        "parallel.mem=2",
        "parallel.zero=3",
        "parallel.reshard_after_forward=true",
    ),
    (4, "parallel.tp=2", "parallel.dp_replicate=2", "parallel.ep=2", "parallel.mem=4"),
    (4, "parallel.tp=2", "parallel.cp=2", "parallel.ep=4", "parallel.mem=2"),
]
SLOW = [pytest.param(layout, marks=pytest.mark.parity) for layout in MORE]


def optimizer_state(folder: Path) -> dict[str, Tensor]:
    """First moments after ten steps, by parameter."""
    run, _, _ = open_checkpoint(folder / "checkpoints" / "step-00000010")
    names: dict[Tensor, str] = {parameter: name for name, parameter in run.model.named_parameters()}
    return {
        names[p]: state["exp_avg"]
        for optimizer in run.engine.optimizers
        for p, state in optimizer.state.items()
    }


@pytest.mark.parametrize("layout", [*LAYOUTS, *SLOW], ids=lambda layout: " ".join(map(str, layout)))
def test_layouts_train_alike(trained: Callable[..., Path], layout: tuple[int, ...]) -> None:
    run, reference = trained(*layout), trained(1)
    assert_same_curve(run, reference)
    assert_same_state(run, reference)
    ours, theirs = optimizer_state(run), optimizer_state(reference)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        scale = float(theirs[name].abs().max())
        torch.testing.assert_close(
            value, theirs[name], rtol=0, atol=2e-3 * scale, msg=lambda text, n=name: f"{n}: {text}"
        )

    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (run, reference)]
    for key in ("validation_loss", "validation_bits_per_byte", "validation_tokens"):
        assert summaries[0][key] == pytest.approx(summaries[1][key], rel=1e-5), key
    lines, reference_lines = (
        [line for line in read_metrics(folder) if "loss" in line] for folder in (run, reference)
    )
    for line, other in zip(lines[:10], reference_lines[:10], strict=True):
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        for name, value in other.items():  # statistics count every token once
            if name.endswith(("expert_load_max_over_mean", "router_entropy", "gate_mean")):
                assert line[name] == pytest.approx(value, rel=2e-3), name


def test_a_run_goes_on_at_another_tp(trained: Callable[..., Path], tmp_path: Path) -> None:
    """open_checkpoint reads tp 2 on one rank above; this is the way from one rank's checkpoint to tp 2."""
    shutil.copytree(trained(1), tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    shutil.rmtree(folder / "step-00000020")
    (folder / "latest").write_text("step-00000010")
    settings = read_info(folder / "step-00000010")["settings"]
    train_on(
        2,
        parse_settings(settings, [f"run.dir={tmp_path / 'run'}", "parallel.tp=2"], source="test"),
        resume=True,
    )
    assert loss_curve(tmp_path / "run") == pytest.approx(loss_curve(trained(1)), rel=1e-5)
