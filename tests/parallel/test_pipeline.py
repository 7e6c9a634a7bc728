"""Pipelines of every schedule against one rank: gradients, whole runs, checkpoints, validation."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hybridtrain.data.batches import Batch, BatchLoader, BatchShare
from hybridtrain.data.shards import TokenDataset
from hybridtrain.errors import SettingsError, TrainingError
from hybridtrain.launch.local import RENDEZVOUS
from hybridtrain.monitor.metrics import read_metrics
from hybridtrain.parallel.collectives import gather_objects
from hybridtrain.parallel.layout import LayoutError
from hybridtrain.parallel.mesh import make_mesh
from hybridtrain.parallel.stages import SCHEDULES
from hybridtrain.run.assemble import Run, Vocabulary, assemble, make_addressing
from hybridtrain.run.generate import evaluate_checkpoint, generate_text
from hybridtrain.run.loop import train
from hybridtrain.run.process_setup import resolve_layout
from hybridtrain.run.step import by_exchange
from hybridtrain.settings.tree import Settings
from tests.hybridtrain.test_parity import assert_same_curve, assert_same_state, state
from tests.ranks import run_on_ranks
from tests.training import ci_settings, complete_gradients, loss_curve, make_data, train_on

TIED = "model.tie_embeddings=true"
WORLDS = {
    1: {"one": [], "tied one": [TIED]},
    2: {
        "1f1b": ["parallel.pp=2"],
        "gpipe": ["parallel.pp=2", "parallel.schedule=gpipe", "parallel.stage_cuts=[2, 2]"],
        "dualpipev": ["parallel.pp=2", "parallel.schedule=dualpipev"],
        "tied": ["parallel.pp=2", TIED],
    },
    4: {
        "1f1b, dp_shard 2, ep 2": [
            "parallel.pp=2",
            "parallel.ep=2",
            "parallel.zero=3",
            "parallel.reshard_after_forward=true",
        ]
    },
}
SLOW_WORLDS = {  # five steps of such layouts are in the fast part of the parity matrix
    4: {
        "pp 4": ["parallel.pp=4", "parallel.mem=2"],
        "tp 2": ["parallel.pp=2", "parallel.tp=2", "parallel.ep=2", "parallel.etp=1"],
        "zbv, cp 2": [
            "parallel.pp=2",
            "parallel.schedule=zbv",
            "parallel.cp=2",
            "parallel.ep=2",
            "parallel.mem=2",
        ],
        "zero_bubble, dp_shard 2, ep 2": [
            "parallel.pp=2",
            "parallel.schedule=zero_bubble",
            "parallel.ep=2",
            "parallel.mem=1",
        ],
    },
}
AUX = ("model.moe.aux_weight=0.01", "model.moe.z_weight=0.001")  # losses that arise inside stages


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data folder. Read only."""
    return make_data(tmp_path_factory.mktemp("pipeline") / "data")


def settings_of(data: Path, *overrides: str) -> Settings:
    return ci_settings(Path("unused"), data, "train.micro_batches=4", *overrides)


def build(settings: Settings) -> tuple[Run, Batch]:
    """This rank's parts of the run, and its part of the first batch."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    mesh = make_mesh(resolve_layout(settings, world), rank, torch.device("cpu"), 60)
    dataset = TokenDataset.open(settings.data.path, verify=False)
    vocabulary = Vocabulary.of(dataset)
    run = assemble(settings, mesh, vocabulary, make_addressing(settings, vocabulary))
    train, layout = settings.train, mesh.layout
    share = BatchShare(train.global_batch, train.micro_batches, layout.coordinate(rank, "dp"), layout.dp)
    loader = BatchLoader(dataset.split("train"), train.seq_len, share, seed=0)
    return run, loader.load(0)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def assert_sends_are_numbered_alike(run: Run) -> None:
    """Who sends and who receives count the same, as the watchdog needs it."""
    mine = {call.ranks: call.number for call in run.mesh.traffic.last_calls() if call.group == "pp"}
    counted = gather_objects(mine, run.mesh.world)
    for ranks in {ranks for numbers in counted for ranks in numbers}:
        first, second = (counted[rank][ranks] for rank in ranks)
        assert first == second > 0, ranks


def first_step(settings: Settings) -> dict[str, Tensor]:
    return one_step(*build(settings))


def one_step(run: Run, batch: Batch) -> dict[str, Tensor]:
    """Loss, gradients by name, and the touched rows' numbers and gradients, as this rank has them."""
    table = run.table
    assert table is not None
    plan = table.plan(batch)
    ((exchange, micro_batches),) = by_exchange(batch.at(run.positions), plan, torch.device("cpu"))
    assert exchange is not None
    table.fetch(plan, exchange)
    run.set_mode(training=True)
    loss = run.schedule.step(micro_batches, True, lambda _: nullcontext())
    assert_sends_are_numbered_alike(run)
    rows = table.new_gradient(plan)
    table.push(exchange, rows)
    table.exchange.reduce_replicas(rows)
    run.engine.squares(None)
    complete_gradients(run)
    out = {"loss": loss / run.mesh.layout.tp}
    for number, stage in enumerate(run.model_parts):
        for name, parameter in stage.named_parameters():
            assert parameter.grad is not None, name
            out[f"{name}@{number}" if name in out else name] = whole(parameter.grad)
    return out | {"touched": plan.touched_N + table.low, "rows": rows}


def first_steps(settings: list[Settings]) -> list[dict[str, Tensor]]:
    return [first_step(s) for s in settings]


def assert_same_gradients(ranks: list[dict[str, Tensor]], reference: dict[str, Tensor]) -> None:
    """Every gradient of the one-rank step is on some rank, and equal wherever it is."""
    found = set()
    for rank in ranks:
        for full, value in rank.items():
            name = full.split("@")[0]
            found.add(name)
            if name not in ("loss", "rows", "touched"):
                torch.testing.assert_close(
                    value, reference[name], rtol=2e-4, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}"
                )
    assert found == reference.keys()
    touched, order = torch.cat([rank["touched"] for rank in ranks]).sort()
    assert torch.equal(touched, reference["touched"])
    torch.testing.assert_close(
        torch.cat([rank["rows"] for rank in ranks])[order], reference["rows"], rtol=2e-4, atol=1e-8
    )
    assert sum(float(rank["loss"]) for rank in ranks) == pytest.approx(float(reference["loss"]), rel=1e-6)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied embeddings"])
def test_gradients_of_every_schedule(data: Path, tied: bool) -> None:
    model = (*AUX, f"model.tie_embeddings={str(tied).lower()}")
    reference = first_step(settings_of(data, *model))
    schedules = list(SCHEDULES)
    runs = run_on_ranks(
        first_steps,
        2,
        [settings_of(data, *model, "parallel.pp=2", f"parallel.schedule={s}") for s in schedules],
    )
    for number in range(len(schedules)):
        ranks = [rank[number] for rank in runs]
        assert_same_gradients(ranks, reference)


@pytest.mark.parametrize("axis", ["tp", "cp"])
def test_gradients_of_every_schedule_with_cut_sequences(data: Path, axis: str) -> None:
    model = (*AUX, "model.tie_embeddings=true")
    reference = first_step(settings_of(data, *model))
    layout = ("parallel.pp=2", f"parallel.{axis}=2", "parallel.ep=2")
    schedules = list(SCHEDULES)
    runs = run_on_ranks(
        first_steps, 4, [settings_of(data, *model, *layout, f"parallel.schedule={s}") for s in schedules]
    )
    for number in range(len(schedules)):
        assert_same_gradients([rank[number] for rank in runs], reference)


def train_each(runs: list[Settings], store: str) -> None:
    """On a rank: whole training runs, one after the other."""
    if dist.get_world_size() == 1:
        dist.destroy_process_group()
    for number, settings in enumerate(runs):
        os.environ[RENDEZVOUS] = f"file://{store}{number}"  # the first run takes the world that is there
        train(settings)


def train_all(worlds: dict[int, dict[str, list[str]]], folder: Path, data: Path) -> dict[str, Path]:
    """Folders of finished runs by name."""

    def settings(name: str, *overrides: str) -> Settings:
        return ci_settings(folder / name, data, "train.micro_batches=4", *overrides)

    for nproc, each in worlds.items():
        run_on_ranks(
            train_each,
            nproc,
            [settings(n, *o) for n, o in each.items()],
            str(folder / f"store{nproc}-"),
            timeout=240,
        )
    return {name: folder / name for each in worlds.values() for name in each}


@pytest.fixture(scope="session")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Read only: copy one before changing it."""
    return train_all(WORLDS, tmp_path_factory.mktemp("runs"), data)


@pytest.fixture(scope="session")
def slow_runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Read only."""
    return train_all(SLOW_WORLDS, tmp_path_factory.mktemp("runs"), data)


def assert_trained_alike(run: Path, one: Path) -> None:
    assert_same_curve(run, one)
    assert_same_state(run, one)
    ours, theirs = read_metrics(run), read_metrics(one)
    for mine, other in zip(ours, theirs, strict=True):
        if "validation_loss" in mine:
            assert mine["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-5)
            assert mine["validation_tokens"] == other["validation_tokens"]
        else:
            assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
            assert mine["layers.2/expert_load"] == pytest.approx(other["layers.2/expert_load"], abs=2e-3)
            assert mine["layers.1/gate_mean"] == pytest.approx(other["layers.1/gate_mean"], rel=1e-4)


@pytest.mark.parametrize("name", [name for nproc in (2, 4) for name in WORLDS[nproc] if name != "tied"])
def test_runs_train_alike(runs: dict[str, Path], name: str) -> None:
    assert_trained_alike(runs[name], runs["one"])


@pytest.mark.parity
@pytest.mark.parametrize("name", list(SLOW_WORLDS[4]))
def test_more_runs_train_alike(runs: dict[str, Path], slow_runs: dict[str, Path], name: str) -> None:
    assert_trained_alike(slow_runs[name], runs["one"])


def test_1f1b_and_gpipe_are_bitwise_equal(runs: dict[str, Path]) -> None:
    assert loss_curve(runs["1f1b"]) == loss_curve(runs["gpipe"])
    ours, theirs = state(runs["1f1b"], 20), state(runs["gpipe"], 20)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_a_checkpoint_of_a_pipeline_is_used_in_one_process(runs: dict[str, Path]) -> None:
    run = runs["1f1b, dp_shard 2, ep 2"]
    values = evaluate_checkpoint(run, "validation", None, 0)
    last = [line for line in read_metrics(run) if "validation_loss" in line][-1]
    assert values["loss"] == pytest.approx(last["validation_loss"], rel=1e-5)
    assert len(generate_text(run, "The people", 5, 0.0, 0, 0)) > len("The people")


def resumed(run: Path, folder: Path, nproc: int, data: Path, *overrides: str) -> Path:
    """A copy of the run without what came after step 10, trained on from there at another layout."""
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000020")
    (folder / "checkpoints" / "latest").write_text("step-00000010")
    train_on(nproc, ci_settings(folder, data, "train.micro_batches=4", *overrides), resume=True)
    return folder


@pytest.mark.parametrize(
    ("name", "nproc", "overrides"),
    [
        ("1f1b, dp_shard 2, ep 2", 1, []),
        ("one", 2, ["parallel.pp=2", "parallel.schedule=zbv"]),
        ("dualpipev", 2, ["parallel.pp=2", "parallel.stage_cuts=[3, 1]"]),
    ],
    ids=["pp 2 to one rank", "one rank to zbv", "dualpipev to 1f1b"],
)
def test_a_run_goes_on_at_another_layout(
    runs: dict[str, Path], data: Path, tmp_path: Path, name: str, nproc: int, overrides: list[str]
) -> None:
    again = resumed(runs[name], tmp_path / "run", nproc, data, *overrides)
    assert_same_curve(again, runs["one"])
    assert_same_state(again, runs["one"])


def test_tied_embeddings_are_saved_once_and_stay_equal(
    runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    again = resumed(runs["tied"], tmp_path / "run", 2, data, TIED, "parallel.pp=2", "parallel.schedule=zbv")
    for run in (runs["tied"], again):
        assert_same_curve(run, runs["tied one"])
        assert_same_state(run, runs["tied one"])
    ours, theirs = (read_metrics(runs[name]) for name in ("tied", "tied one"))
    for mine, other in zip(ours[:5], theirs[:5], strict=True):
        assert mine["grad_norm"] == pytest.approx(
            other["grad_norm"], rel=1e-4
        )  # the copy's gradient is not counted


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["engram.exchange_groups=2"],
            "engram.exchange_groups=2: a pipeline needs the rows of all micro-batches at once; it may be 1",
        ),
        (
            ["parallel.schedule=dualpipev", "train.micro_batches=3"],
            "train.micro_batches=3 is below the 4 stages",
        ),
        (["parallel.stage_cuts=[3]"], "parallel.stage_cuts=\\[3\\] has 1 stages with 3 layers, not 2 with 4"),
        (
            ["parallel.schedule=zbv", "parallel.zero=3", "parallel.reshard_after_forward=true"],
            "parallel.reshard_after_forward=true frees parameters that parallel.schedule=zbv still needs",
        ),
    ],
)
def test_contradictions_are_refused(data: Path, overrides: list[str], expected: str) -> None:
    with pytest.raises((SettingsError, LayoutError), match=expected):
        resolve_layout(settings_of(data, "parallel.pp=2", *overrides), 2)


def diverge(settings: Settings) -> str:
    with pytest.raises(TrainingError) as error:
        train(settings)
    return str(error.value)


def test_the_source_of_what_is_not_finite_is_named_on_every_rank(data: Path, tmp_path: Path) -> None:
    run = [
        "parallel.pp=2",
        "parallel.schedule=zbv",
        "optim.lr=1e30",
        "optim.weight_decay=0.0",
        "optim.warmup_steps=0",
        "optim.clip_norm=0",
    ]
    first, second = run_on_ranks(
        diverge, 2, ci_settings(tmp_path / "run", data, "train.micro_batches=4", *run)
    )
    assert first == second
    assert "the first values that are not finite come out of layers." in first
