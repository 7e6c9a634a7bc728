"""bfloat16 layers under float32 parameters: one path for one rank and many, close to float32 everywhere."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hybridtrain.errors import SettingsError
from hybridtrain.launch.local import RENDEZVOUS
from hybridtrain.monitor.metrics import read_metrics
from hybridtrain.parallel.fsdp import RankOrderSum
from hybridtrain.parallel.mesh import close_mesh
from hybridtrain.run.generate import evaluate_checkpoint, generate_text, open_checkpoint
from hybridtrain.run.loop import train
from hybridtrain.run.process_setup import compute_dtype
from hybridtrain.settings.tree import Settings
from tests.ranks import run_on_ranks
from tests.training import Trace, ci_settings, loss_curve, traces, updated_weights

SHORT = ("train.micro_batches=2", "train.global_batch=8", "model.moe.aux_weight=0.01")
HALF = "train.precision=bfloat16"
LAYOUTS = [
    ["parallel.ep=2", "parallel.zero=3", "parallel.reshard_after_forward=true", "train.recompute=full"],
    ["parallel.tp=2", "parallel.etp=2", "train.recompute=selective"],
    ["parallel.cp=2", "parallel.ep=2"],
    ["parallel.pp=2", "train.recompute=full"],
]


def test_auto_is_float32_on_the_cpu_and_bfloat16_on_cuda() -> None:
    settings = Settings()
    assert compute_dtype(settings, torch.device("cpu")) == torch.float32
    assert compute_dtype(settings, torch.device("cuda", 0)) == torch.bfloat16
    odd = Settings.model_validate({"model": {"moe": {"hidden": 12}}})
    assert compute_dtype(odd, torch.device("cpu")) == torch.float32
    with pytest.raises(SettingsError, match=r"model.moe.hidden=12 is not a multiple of 8.*; the next is 16"):
        compute_dtype(odd, torch.device("cuda", 0))


def spied(runs: list[Settings]) -> tuple[list[Trace], set[torch.dtype], set[torch.dtype]]:
    """On a rank: the traces, and in what FSDP added up gradients and parameters were gathered (by FSDP and
    tp).
    """
    reduced: set[torch.dtype] = set()
    gathered: set[torch.dtype] = set()
    real_reduce, real_gather = RankOrderSum.__call__, dist.all_gather_single

    def reduce(self: Any, output_tensor: Any, input_tensor: Any, **kwargs: Any) -> None:
        reduced.update((output_tensor.dtype, input_tensor.dtype))
        real_reduce(self, output_tensor, input_tensor, **kwargs)

    def gather(output: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        gathered.add(input.dtype)
        return real_gather(output, input, *args, **kwargs)

    RankOrderSum.__call__, dist.all_gather_single = reduce, gather  # type: ignore[method-assign]
    return traces(runs), reduced, gathered


def assert_close(ours: Trace, theirs: Trace) -> None:
    assert ours.losses == pytest.approx(theirs.losses, rel=2e-3)
    for name, value in ours.state.items():
        assert value.dtype == torch.float32, name


def test_layouts_compute_alike(ci_data: Path) -> None:
    settings = [ci_settings(Path("unused"), ci_data, *SHORT, HALF, *layout) for layout in LAYOUTS]
    single, half = run_on_ranks(
        traces, 1, [ci_settings(Path("unused"), ci_data, *SHORT, *p) for p in ([], [HALF])]
    )[0]
    assert half.losses != single.losses
    assert_close(half, single)
    assert {grad.dtype for grad in half.gradients[0].values()} == {torch.float32}
    off = {
        name: float((g - single.gradients[0][name]).norm() / single.gradients[0][name].norm())
        for name, g in half.gradients[0].items()
    }
    assert max(off.values()) < 0.2, (
        off
    )  # gates near zero and tokens that go to other experts magnify rounding
    assert median(off.values()) < 0.05
    for traced, reduced, gathered in run_on_ranks(spied, 2, settings):
        assert reduced == {torch.float32}
        assert torch.bfloat16 in gathered
        for run in traced:
            assert_close(run, half)


def train_here_alone(settings: Settings, store: str) -> None:
    os.environ[RENDEZVOUS] = f"file://{store}"
    dist.destroy_process_group()
    train(settings)
    assert not dist.is_initialized()


def test_a_run_its_checkpoint_and_its_use(ci_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ci_settings(
        run,
        ci_data,
        *SHORT,
        HALF,
        "train.steps=4",
        "optim.backbone=muon",
        "checkpoint.every=2",
        "train.eval_every=4",
    )
    run_on_ranks(train_here_alone, 1, settings, str(tmp_path / "store"))
    assert len(loss_curve(run)) == 4
    logged = [line for line in read_metrics(run) if "validation_loss" in line][-1]["validation_loss"]
    try:
        opened, _, _ = open_checkpoint(run)
        assert {p.dtype for p in opened.model.parameters()} == {torch.bfloat16}
        assert {weight.dtype for weight in updated_weights(opened).values()} == {torch.float32}
        assert evaluate_checkpoint(run, "validation", None, 0)["loss"] == pytest.approx(logged, rel=1e-6)
        assert len(generate_text(run, "The people", 3, 0.0, 0, 0)) > len("The people")
    finally:
        close_mesh()
