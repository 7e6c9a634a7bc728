"""Compiled layers: the same losses, the same traffic, and a refusal where there is no compiler."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybridtrain.errors import SettingsError
from hybridtrain.run.process_setup import check_compiler
from hybridtrain.settings.tree import Settings
from tests.ranks import run_on_ranks
from tests.training import Trace, assert_bitwise, ci_settings, make_data, trace, traces

SHORT = ("train.micro_batches=2", "train.global_batch=8", "train.seq_len=40", "model.moe.aux_weight=0.01")
ONE_LAYER = 'model.layers=["attention+dense"]'
COMPILE, HALF = "train.compile=true", "train.precision=bfloat16"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("compile") / "data")


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.model_validate({"train": {"compile": True}})
    check_compiler(settings)
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_compiler(Settings())
    with pytest.raises(
        SettingsError,
        match="needs a C\\+\\+ compiler and there is no no-such-compiler; install one, name yours in CXX",
    ):
        check_compiler(settings)


def assert_alike(ours: Trace, theirs: Trace) -> None:
    """The same losses but for the rounding of fused operations, the same counts and the same traffic."""
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert ours.traffic == theirs.traffic
    for name, grad in ours.gradients[0].items():
        reference = theirs.gradients[0][name]
        assert float((grad - reference).norm()) < 1e-4 * float(reference.norm()) + 1e-7, name
    for name, value in ours.statistics[0].items():
        torch.testing.assert_close(value, theirs.statistics[0][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parity  # inductor compiles every kind of layer: a minute with a cold cache
def test_a_compiled_layer_computes_the_same(
    data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # so that it does compile
    plain = trace(ci_settings(Path("unused"), data, *SHORT, ONE_LAYER))
    compiled = trace(ci_settings(Path("unused"), data, *SHORT, ONE_LAYER, COMPILE))
    assert list(tmp_path.rglob("*.cpp"))
    assert_alike(compiled, plain)


@pytest.mark.parity
def test_compiled_layers_of_every_kind(data: Path) -> None:
    plain, compiled, recomputed = traces(
        [
            ci_settings(Path("unused"), data, *SHORT, *also)
            for also in ([], [COMPILE], [COMPILE, "train.recompute=full"])
        ]
    )
    assert_alike(compiled, plain)
    assert recomputed.losses == compiled.losses
    assert all(torch.equal(value, compiled.state[name]) for name, value in recomputed.state.items())


@pytest.mark.parity
def test_bfloat16_is_as_far_from_float32_compiled_as_not(data: Path) -> None:
    single, half, compiled = traces(
        [ci_settings(Path("unused"), data, *SHORT, *also) for also in ([], [HALF], [HALF, COMPILE])]
    )
    assert compiled.losses == pytest.approx(single.losses, rel=1e-3)
    assert compiled.losses != half.losses
    for name, exact in single.gradients[0].items():
        if name.endswith(("engram.wk.weight", "engram.h_norm.weight", "engram.k_norm.weight")):
            # one token whose gate rounding takes across gate_floor moves these by a tenth and more, compiled
            # or not
            continue
        off, rounding = (float((run.gradients[0][name] - exact).norm()) for run in (compiled, half))
        assert off < 2 * rounding + 1e-7, name


QUICK = {
    "ep": ["parallel.ep=2", "train.recompute=full", 'model.layers=["attention+dense", "attention+moe"]'],
    "tp": ["parallel.tp=2", "train.recompute=full", 'model.layers=["engram+attention+dense"]'],
}
TWO = {
    "cp": ["parallel.cp=2", 'model.layers=["engram+attention+dense"]'],
    "pp": [
        "parallel.pp=2",
        "parallel.schedule=gpipe",
        'model.layers=["attention+dense", "engram+attention+moe"]',
    ],
}
FOUR = {
    "tp, cp": ["parallel.tp=2", "parallel.cp=2", "parallel.ep=4", "train.recompute=full"],
    "pp, tp": ["parallel.pp=2", "parallel.schedule=interleaved", "parallel.tp=2", "train.recompute=full"],
    "pp, cp": ["parallel.pp=2", "parallel.cp=2", "parallel.mem=2"],
    "hsdp": [
        "parallel.dp_replicate=2",
        "parallel.ep=2",
        "parallel.zero=3",
        "parallel.reshard_after_forward=true",
        "train.recompute=full",
    ],
}


def traces_op_by_op(runs: list[Settings]) -> tuple[list[Trace], int]:
    """On a rank: `traces` with the graphs that inductor would get, run as they are; and how many."""
    torch.compiler.set_default_backend("aot_eager")
    out = traces(runs, 2)
    return out, torch._dynamo.utils.counters["stats"]["unique_graphs"]


def assert_bitwise_over(nproc: int, data: Path, layouts: dict[str, list[str]]) -> None:
    """What is compiled, exchanged and run again is the same, bit for bit, where no operations are fused."""
    runs = [
        ci_settings(Path("unused"), data, *SHORT, *layout, *c)
        for layout in layouts.values()
        for c in ([], [COMPILE])
    ]
    for rank, graphs in run_on_ranks(traces_op_by_op, nproc, runs, timeout=280):
        assert graphs >= 4 * len(layouts)
        for number, name in enumerate(layouts):
            plain, compiled = rank[2 * number : 2 * number + 2]
            assert_bitwise(compiled, plain)
            assert compiled.traffic == plain.traffic, name


@pytest.mark.parametrize("layouts", [QUICK, pytest.param(TWO, marks=pytest.mark.parity)], ids=["few", "more"])
def test_layouts_over_two_ranks(data: Path, layouts: dict[str, list[str]]) -> None:
    assert_bitwise_over(2, data, layouts)


@pytest.mark.parity
@pytest.mark.parametrize("name", list(FOUR))
def test_layouts_over_four_ranks(data: Path, name: str) -> None:
    assert_bitwise_over(4, data, {name: FOUR[name]})


@pytest.mark.parity
@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.ep=2", "parallel.zero=3", "parallel.reshard_after_forward=true"],
        ["parallel.ep=2", "train.recompute=full", "engram.fetch=overlap"],
        ["parallel.dp_replicate=2", "engram.fetch=stale"],
        ["parallel.tp=2", "parallel.ep=2"],
        ["parallel.tp=2", "parallel.etp=2", "train.recompute=full", "model.moe.capacity=1.1"],
        ["parallel.cp=2", "parallel.ep=2", "train.recompute=full"],
        ["parallel.pp=2", "parallel.mem=1"],
        ["parallel.pp=2", "parallel.schedule=interleaved", "train.recompute=full"],
    ],
    ids=" ".join,
)
def test_compiled_layers_over_two_ranks(data: Path, layout: list[str]) -> None:
    runs = [ci_settings(Path("unused"), data, *SHORT, *layout, *compiled) for compiled in ([], [COMPILE])]
    for plain, compiled in run_on_ranks(traces, 2, runs, timeout=280):
        assert_alike(compiled, plain)
