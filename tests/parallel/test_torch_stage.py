"""Pipelines whose stages pass several tensors: DenseFormer against one rank, traffic, and what stays in memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hybridtrain.parallel.apply import write_local
from hybridtrain.parallel.pipeline import Pipeline
from hybridtrain.parallel.stages import SCHEDULES
from hybridtrain.parallel.torch_stage import TorchStage
from hybridtrain.run.assemble import Run
from hybridtrain.settings.tree import Settings
from tests.hybridtrain.test_parity import assert_same_curve, assert_same_state
from tests.parallel.test_pipeline import assert_same_gradients, build, one_step, resumed, settings_of, train_all
from tests.ranks import run_on_ranks
from tests.training import make_data

DENSE = 'model.residual="dense_former"'
MODEL = (DENSE, "model.moe.aux_weight=0.01", "model.moe.z_weight=0.001")
SIX_LAYERS = (
    'model.layers=["attention+dense", "engram+attention+moe", "2*attention+moe", "2*attention+dense"]'
)
PP = "parallel.pp=2"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data folder. Read only."""
    return make_data(tmp_path_factory.mktemp("streams") / "data")


def mix_all(run: Run) -> None:
    """Depth weights as after some training: at their start no gradient flows to a source but the newest."""
    for model in run.model_parts:
        for name, parameter in model.named_parameters():
            if name.endswith(".alpha"):
                values = torch.linspace(-0.4, 0.3, parameter.shape[0])
                with torch.no_grad():
                    write_local(parameter, lambda rows, values=values: values[rows])


def mixed_step(settings: Settings) -> dict[str, Tensor]:
    """Loss and gradients of a step, the sum of the losses without training, bytes sent along `pp`."""
    run, batch = build(settings)
    mix_all(run)
    out = one_step(run, batch)
    out["sent"] = torch.tensor(run.mesh.traffic.bytes_by_group().get("pp", 0))
    return out


def mixed_steps(settings: list[Settings]) -> list[dict[str, Tensor]]:
    return [mixed_step(s) for s in settings]


def compare(data: Path, nproc: int, layouts: list[list[str]], *model: str) -> list[list[int]]:
    """Gradients of the layouts against one rank's; returns the bytes that each rank sent along `pp`."""
    reference = mixed_step(settings_of(data, *MODEL, *model))
    assert float(reference["layers.3.residual.alpha"].abs().min()) > 1e-4  # every source is used
    del reference["sent"]
    settings = [settings_of(data, *MODEL, *model, *layout) for layout in layouts]
    runs = run_on_ranks(mixed_steps, nproc, settings, timeout=240)
    sent = []
    for number in range(len(layouts)):
        ranks = [rank[number] for rank in runs]
        sent.append([int(rank.pop("sent")) for rank in ranks])
        assert_same_gradients(ranks, reference)
    return sent


def tensors(data: Path, counts: list[int], *overrides: str) -> list[int]:
    """Bytes of so many tensors between stages for every micro-batch."""
    s = settings_of(data, *overrides)
    one = s.train.global_batch * s.train.seq_len * s.model.dim * 4
    return [count * one for count in counts]


def test_gradients_and_traffic_of_every_schedule(data: Path) -> None:
    layouts = [[PP, f"parallel.schedule={schedule}"] for schedule in SCHEDULES]
    layouts += [[PP, "parallel.schedule=interleaved", "parallel.stage_cuts=[1, 2, 2, 1]"]]
    sent = dict(zip([*SCHEDULES, "six layers"], compare(data, 2, layouts[:-1]), strict=False))
    # two ranks: the balance cuts after layer 2, so X_0, X_1 and X_2 cross, or there are stages of one layer
    assert sent["gpipe"] == sent["1f1b"] == tensors(data, [3, 3])
    assert sent["interleaved"] == sent["zero_bubble"] == tensors(data, [3 + 1, 1 + 3])
    assert sent["zbv"] == sent["dualpipev"] == tensors(data, [2 + 2, 2 + 2])
