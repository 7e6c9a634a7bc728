"""Pipelines whose stages pass several tensors: DenseFormer against one rank, traffic, memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hybridtrain.parallel.apply import write_local
from hybridtrain.parallel.pipeline import Pipeline
from hybridtrain.parallel.stages import SCHEDULES
from hybridtrain.parallel.torch_stage import TorchStage
from hybridtrain.run.assemble import Run
from hybridtrain.settings.rules import WHOLE_BACKWARD
from hybridtrain.settings.tree import Settings
from tests.hybridtrain.test_parity import assert_same_curve, assert_same_state
from tests.parallel.test_pipeline import (
    assert_same_gradients,
    assert_trained_alike,
    build,
    one_step,
    resumed,
    settings_of,
    train_all,
)
from tests.ranks import run_on_ranks
from tests.training import make_data

DENSE = 'model.residual="dense_former"'
MODEL = (DENSE, "model.moe.aux_weight=0.01", "model.moe.z_weight=0.001")
PP = "parallel.pp=2"
SPLIT = ("zero_bubble", "zbv", "dualpipev")  # schedules that go back to inputs and weights apart


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


class Watch:
    """Notes of every micro-batch what came to this rank's stages or was made by them, and looks for it after
    each backward pass."""

    def __init__(self, stages: list[TorchStage], parts: bool) -> None:
        self.parts = parts  # weights of a stage may come after the inputs of an earlier one
        self.storages: dict[tuple[int, int], dict[str, StorageWeakRef]] = {}
        self.passes: dict[int, int] = {}  # of a micro-batch, that are to come; two a stage
        self.seen = 0
        self.late: list[str] = []
        for stage in stages:
            self._wrap(stage)

    def _wrap(self, stage: TorchStage) -> None:
        forward, backward = stage.forward_one_chunk, stage.backward_one_chunk
        weight, number = stage.backward_weight_one_chunk, stage.stage_index

        def watched_forward(m: int, *args: Any, **kwargs: Any) -> Any:
            out = forward(m, *args, **kwargs)
            tensors = {n: stage.inputs[m][n] for n in stage.names.received} | stage.made(m)
            self.storages[m, number] = {n: StorageWeakRef(x.untyped_storage()) for n, x in tensors.items()}
            self.seen += len(tensors)
            self.passes[m] = self.passes.get(m, 0) + 2
            return out

        def watched_backward(m: int, *args: Any, full_backward: bool = True, **kwargs: Any) -> None:
            backward(m, *args, full_backward=full_backward, **kwargs)
            self.late += [f"kept {n} of {m}" for n in stage.names.kept if n in stage.kept.sources[m]]
            self._went_back(m, number, 2 if full_backward else 1)

        def watched_weight(m: int, *args: Any, **kwargs: Any) -> None:
            weight(m, *args, **kwargs)
            self._went_back(m, number, 1)

        vars(stage).update(
            forward_one_chunk=watched_forward,
            backward_one_chunk=watched_backward,
            backward_weight_one_chunk=watched_weight,
        )

    def _went_back(self, m: int, number: int, passes: int) -> None:
        self.passes[m] -= passes
        over = [number] if not self.parts else [s for mb, s in self.storages if mb == m]
        if not self.parts or self.passes[m] == 0:
            for stage in over:
                for name, storage in self.storages.pop((m, stage)).items():
                    if not storage.expired():
                        self.late.append(f"{name} of stage {stage}, micro-batch {m}")


def mixed_step(settings: Settings) -> dict[str, Any]:
    """Of a step: loss and gradients, losses without training, bytes sent along `pp`, what a `Watch` saw."""
    run, batch = build(settings)
    mix_all(run)
    step, out = run.schedule.step, {}
    stages = run.schedule.torch_stages if isinstance(run.schedule, Pipeline) else []

    def both(*args: Any) -> Tensor:
        out["losses"] = run.schedule.losses(args[0])
        before = run.mesh.traffic.bytes_by_group().get("pp", 0)
        watch = Watch(stages, settings.parallel.schedule in SPLIT)
        loss = step(*args)
        out["sent"] = run.mesh.traffic.bytes_by_group().get("pp", 0) - before
        out["seen"], out["late"] = watch.seen, watch.late
        assert not watch.storages  # all micro-batches went back
        return loss

    vars(run.schedule)["step"] = both
    return one_step(run, batch) | out


def mixed_steps(settings: list[Settings]) -> list[dict[str, Any]]:
    return [mixed_step(s) for s in settings]


def compare(data: Path, nproc: int, layouts: list[list[str]], *model: str) -> list[list[dict[str, Any]]]:
    """Every layout's gradients against one rank's; returns the other results by layout and rank."""
    reference = mixed_step(settings_of(data, *MODEL, *model))
    assert float(reference["layers.3.residual.alpha"].abs().min()) > 1e-4  # every source is used
    others = ("losses", "sent", "seen", "late")
    expected = {name: reference.pop(name) for name in others}["losses"]
    runs = run_on_ranks(
        mixed_steps, nproc, [settings_of(data, *MODEL, *model, *o) for o in layouts], timeout=240
    )
    out = []
    for number, layout in enumerate(layouts):
        out.append([{name: rank[number].pop(name) for name in others} for rank in runs])
        assert_same_gradients([rank[number] for rank in runs], reference)
        if nproc == int(layout[0][-1]):  # the ranks of one pipeline
            losses = torch.stack([rank["losses"] for rank in out[-1]]).sum(0)
            torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
    return out


def tensors(data: Path, *counts: int) -> list[int]:
    """Bytes of so many tensors between stages for every micro-batch of a step."""
    s = settings_of(data)
    one = s.train.global_batch * s.train.seq_len * s.model.dim * 4
    return [count * one for count in counts]


def schedules(pp: int, *overrides: str) -> list[list[str]]:
    return [[f"parallel.pp={pp}", f"parallel.schedule={schedule}", *overrides] for schedule in SCHEDULES]


def test_gradients_traffic_and_memory_of_every_schedule(data: Path) -> None:
    results = dict(zip(SCHEDULES, compare(data, 2, schedules(2)), strict=True))
    sent = {schedule: [rank["sent"] for rank in ranks] for schedule, ranks in results.items()}
    # four layers on two ranks: X_0, X_1 and X_2 cross the middle; stages of one layer send what is new
    assert sent["gpipe"] == sent["1f1b"] == tensors(data, 3, 3)
    assert sent["interleaved"] == sent["zero_bubble"] == tensors(data, 3 + 1, 1 + 3)
    assert sent["zbv"] == sent["dualpipev"] == tensors(data, 2 + 2, 2 + 2)
    for schedule, ranks in results.items():
        for rank in ranks:
            assert rank["seen"] >= 4 * 3
            # torch's loops over one stage hold on to the operations of a micro-batch
            late = {text.split(", ")[1] for text in rank["late"]}
            assert len(late) <= (schedule in ("gpipe", "1f1b")), (schedule, late)


@pytest.mark.parity
@pytest.mark.parametrize("axis", ["tp", "cp"])
def test_gradients_with_cut_sequences(data: Path, axis: str) -> None:
    results = compare(data, 4, schedules(2, f"parallel.{axis}=2", "parallel.ep=2"))
    sent = {s: [rank["sent"] for rank in ranks] for s, ranks in zip(SCHEDULES, results, strict=True)}
    assert sent["gpipe"] == [count // 2 for count in tensors(data, 3, 3, 3, 3)]
    assert sent["zbv"] == [count // 2 for count in tensors(data, 4, 4, 4, 4)]


@pytest.mark.parity
def test_gradients_of_long_pipelines(data: Path) -> None:
    """Four ranks with eight stages of one layer, or four of two; two ranks with six stages, some of more."""
    layers = 'model.layers=["attention+dense", "engram+attention+moe", "6*attention+dense"]'
    model = (layers, "train.micro_batches=8", "train.global_batch=8")
    results = compare(data, 4, schedules(4), *model)
    sent = {s: [rank["sent"] for rank in ranks] for s, ranks in zip(SCHEDULES, results, strict=True)}
    one = 8 * settings_of(data).train.seq_len * settings_of(data).model.dim * 4
    hops = [2, 3, 4, 3, 3, 3, 3]  # tests/parallel/test_streams.py
    expected = [0] * 4
    for hop, count in enumerate(hops):
        expected[hop % 4] += count * one
        expected[(hop + 1) % 4] += count * one
    assert sent["interleaved"] == sent["zero_bubble"] == expected
    three = ["parallel.pp=2", "parallel.schedule=interleaved", "parallel.stages_per_rank=3"]
    compare(data, 2, [[*three, "parallel.stage_cuts=[1, 2, 1, 1, 2, 1]"]], *model)


@pytest.mark.parity
def test_gradients_with_data_parallelism_recomputation_and_compilation(data: Path) -> None:
    compare(data, 4, schedules(2, "parallel.dp_shard=2", "parallel.ep=2"))
    again = ["train.recompute=full", "train.recompute=selective", "train.compile=true"]
    whole = [["parallel.pp=2", f"parallel.schedule={s}", o] for s in WHOLE_BACKWARD for o in again]
    compare(data, 2, whole)


@pytest.mark.parity
def test_runs_and_checkpoints_go_from_one_layout_to_another(data: Path, tmp_path: Path) -> None:
    one, two = [DENSE], [DENSE, PP, "parallel.schedule=interleaved"]
    runs = train_all({1: {"one": one}, 2: {"two": two}}, tmp_path, data)
    assert_trained_alike(runs["two"], runs["one"])
    back = [DENSE, PP, "parallel.schedule=zbv"]
    for name, nproc, overrides in (("two", 1, one), ("one", 2, back)):
        again = resumed(runs[name], tmp_path / f"{name} again", nproc, data, *overrides)
        assert_same_curve(again, runs["one"])
        assert_same_state(again, runs["one"])
