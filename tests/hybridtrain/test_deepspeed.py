"""DeepSpeed as the engine: the native engine's curve, norms, state and checkpoints; and what it cannot do is
refused.

Gradients are clipped in every step here (clip_norm is below every norm), so that a norm or a factor that is
wrong shows.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridtrain.errors import SettingsError
from hybridtrain.monitor.metrics import read_metrics
from hybridtrain.run.generate import open_checkpoint
from hybridtrain.run.process_setup import join_world
from hybridtrain.settings.load import parse_settings
from hybridtrain.settings.tree import Settings
from tests.hybridtrain.run.test_nonfinite import train_poisoned
from tests.hybridtrain.run.test_resume import at_step_10
from tests.hybridtrain.test_parity import assert_same_curve, assert_same_state, state
from tests.ranks import run_on_ranks
from tests.training import ci_settings, loss_curve, train_here, train_on

ENGINE = "train.engine=deepspeed"
CLIPPED = "optim.clip_norm=0.3"
DENSE = (CLIPPED, 'model.layers=["attention+dense", "engram+attention+dense", "attention+dense"]')
OFFLOAD = "deepspeed.offload_optimizer=true"


def zero(stage: int) -> str:
    return f"deepspeed.zero_stage={stage}"


def moments(folder: Path) -> dict[str, Tensor]:
    """Every moment of the last checkpoint, on one process under the native engine."""
    run, _, _ = open_checkpoint(folder)
    return {name: value for name, value in run.engine.state(0).items() if name.startswith("optim.")}


def assert_same_run(run: Path, reference: Path) -> None:
    assert_same_curve(run, reference)
    assert_same_state(run, reference)
    for ours, theirs in zip(read_metrics(run), read_metrics(reference), strict=True):
        for key in {"grad_norm", "grad_norm_table", "validation_loss"} & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
    moments_here, moments_there = moments(run), moments(reference)
    assert moments_here.keys() == moments_there.keys()
    for (
        name,
        value,
    ) in (
        moments_here.items()
    ):  # a wrong factor in the gradient, which Adam hides from the weights, is bare here
        torch.testing.assert_close(
            value,
            moments_there[name],
            rtol=2e-2,
            atol=1e-2 * float(moments_there[name].abs().max()),
            msg=name,
        )


def slow(*overrides: str) -> Any:
    return pytest.param(overrides, marks=pytest.mark.parity)


@pytest.mark.parametrize(
    "overrides",
    [
        (zero(1), "parallel.ep=2"),
        slow(zero(2), "parallel.ep=2", "train.micro_batches=2", "engram.exchange_groups=2"),
        slow(zero(0), "parallel.ep=2"),
        slow(zero(1), "parallel.ep=1", "parallel.mem=1"),
        slow(zero(1), "parallel.cp=2", "parallel.ep=2", OFFLOAD),
        slow(zero(3), "parallel.ep=1"),
        slow(zero(1), "parallel.ep=2", "train.compile=true"),
    ],
    ids=" ".join,
)
def test_experts_train_as_under_the_native_engine(
    trained: Callable[..., Path], overrides: tuple[str, ...]
) -> None:
    assert_same_run(trained(2, CLIPPED, ENGINE, *overrides), trained(1, CLIPPED))


@pytest.mark.parametrize(
    ("nproc", "overrides"),
    [
        pytest.param(2, (zero(3), "train.micro_batches=2"), marks=pytest.mark.parity),
        pytest.param(2, (zero(2), OFFLOAD, "train.micro_batches=2"), marks=pytest.mark.parity),
        pytest.param(1, (zero(3), OFFLOAD), marks=pytest.mark.parity),
    ],
    ids=str,
)
def test_dense_models_train_as_under_the_native_engine(
    trained: Callable[..., Path], nproc: int, overrides: tuple[str, ...]
) -> None:
    assert_same_run(trained(nproc, *DENSE, ENGINE, *overrides), trained(1, *DENSE))


@pytest.mark.parametrize(
    ("before", "after", "model"),
    [
        ((2, ENGINE, zero(1), "parallel.ep=2"), (1,), (CLIPPED,)),
        ((1,), (2, ENGINE, zero(1), "parallel.ep=2"), (CLIPPED,)),
        pytest.param((1,), (2, ENGINE, zero(3)), DENSE, marks=pytest.mark.parity),
    ],
    ids=["deepspeed to native", "native to ZeRO-1", "native to ZeRO-3"],
)
def test_a_run_changes_engines(
    trained: Callable[..., Path],
    ci_data: Path,
    tmp_path: Path,
    before: tuple[Any, ...],
    after: tuple[Any, ...],
    model: tuple[str, ...],
) -> None:
    first = trained(before[0], *model, *before[1:])
    run = at_step_10(first, tmp_path / "run")
    train_on(after[0], ci_settings(run, ci_data, *model, *after[1:]), resume=True)
    assert loss_curve(run)[:10] == loss_curve(first)[:10]
    assert_same_run(run, trained(1, *model))


@pytest.mark.parity
def test_a_resumed_run_is_bitwise_the_undisturbed_one(
    trained: Callable[..., Path], ci_data: Path, tmp_path: Path
) -> None:
    layout = (CLIPPED, ENGINE, zero(2), "parallel.ep=2", "train.micro_batches=2", "engram.exchange_groups=2")
    whole = trained(2, *layout)
    run = at_step_10(whole, tmp_path / "run")
    train_on(2, ci_settings(run, ci_data, *layout), resume=True)
    assert loss_curve(run) == loss_curve(whole)
    ours, theirs = state(run, 20), state(whole, 20)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_nothing_of_a_step_that_is_not_finite_is_kept(ci_data: Path, tmp_path: Path) -> None:
    overrides = (
        ENGINE,
        zero(2),
        "parallel.ep=2",
        "train.steps=6",
        "checkpoint.every=2",
        "train.eval_batches=1",
    )
    messages = run_on_ranks(train_poisoned, 2, ci_settings(tmp_path / "run", ci_data, *overrides), "row")
    assert "the first values that are not finite come out of the fetched table rows (rank " in messages[0]


def train_and_tell(settings: Settings, folder: Path) -> str:
    """On a rank: train, and return what it wrote on the terminal."""
    told = folder / f"rank-{os.environ['RANK']}"
    for number in (1, 2):
        os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    train_here(settings, False)
    return told.read_text(encoding="utf-8")


def test_the_terminal_shows_the_engine_and_not_its_chatter(ci_data: Path, tmp_path: Path) -> None:
    overrides = (ENGINE, zero(2), "parallel.ep=2", "train.steps=1", "train.eval_batches=1")
    told = run_on_ranks(train_and_tell, 2, ci_settings(tmp_path / "run", ci_data, *overrides), tmp_path)
    assert f"│ engine           │ deepspeed {importlib.metadata.version('deepspeed')}, ZeRO-2 " in told[0]
    for chatter in ("[INFO]", "[WARNING]", "deprecated", "Warning"):
        assert chatter not in told[0] + told[1]


AXES = "with train.engine=deepspeed, which spreads over dp_shard, cp, ep and mem"


@pytest.mark.parametrize(
    ("overrides", "problems"),
    [
        (["parallel.tp=2"], [f"parallel.tp=2 {AXES}; tp may be 1"]),
        (["parallel.pp=2"], [f"parallel.pp=2 {AXES}; pp may be 1"]),
        (["parallel.dp_replicate=2"], [f"parallel.dp_replicate=2 {AXES}; dp_replicate may be 1"]),
        (
            ["parallel.tp=2", "parallel.etp=2"],
            [f"parallel.tp=2 {AXES}; tp may be 1", f"parallel.etp=2 {AXES}; etp may be 1"],
        ),
        (
            ["parallel.zero=3"],
            ["parallel.zero=3 with train.engine=deepspeed, which has deepspeed.zero_stage; it may be 1"],
        ),
        (
            ["train.precision=bfloat16"],
            [
                "train.precision=bfloat16 with train.engine=deepspeed, which computes in its parameters' "
                "float32; it may be auto or float32"
            ],
        ),
        (
            ['optim.backbone="muon"'],
            [
                "optim.backbone=muon with train.engine=deepspeed, whose flat parts of parameters are no "
                "matrices; it may be adamw"
            ],
        ),
        (
            [zero(3), "parallel.ep=2"],
            [
                "deepspeed.zero_stage=3 with parallel.ep=2 would add up different experts of different "
                "ranks; zero_stage may be 0, 1 or 2, or ep may be 1"
            ],
        ),
        (
            [zero(0), OFFLOAD],
            [
                "deepspeed.offload_optimizer=true with deepspeed.zero_stage=0, which cuts nothing; "
                "zero_stage may be 1, 2 or 3"
            ],
        ),
    ],
    ids=str,
)
def test_what_deepspeed_cannot_do_is_refused_by_name(overrides: list[str], problems: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings({}, [ENGINE, *overrides])
    assert caught.value.problems == problems
    parse_settings({}, overrides)  # under the native engine all of it is legal


@pytest.mark.parametrize(
    ("installed", "problem"),
    [
        (None, "needs "),
        ("0.18.3", "finds deepspeed 0.18.3 but needs "),
        ("0.20.0+cpu", "finds deepspeed 0.20.0+cpu"),
    ],
)
def test_a_missing_or_other_deepspeed_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, installed: str | None, problem: str
) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(SettingsError, match=r"^train.engine=deepspeed: 1 problem") as caught:
        join_world(parse_settings({}, [ENGINE]))
    (line,) = caught.value.problems
    assert line.startswith(problem)
    assert (
        "deepspeed >= 0.19.8, < 0.20; pip install 'hybridtrain[deepspeed]', or set train.engine=native"
        in line
    )
