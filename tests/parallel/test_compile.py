"""Compiled layers: the same losses, the same traffic, and a refusal where there is no compiler."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybridtrain.assemble import check_compiler
from hybridtrain.errors import SettingsError
from hybridtrain.settings import Settings
from tests.ranks import run_on_ranks
from tests.training import Trace, ci_settings, make_data, trace, traces

SHORT = ("train.micro_batches=2", "train.global_batch=8", "train.seq_len=32", "model.moe.aux_weight=0.01")
ONE_LAYER = 'model.layers=["attention+dense"]'
COMPILE = "train.compile=true"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("compile") / "data")


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.model_validate({"train": {"compile": True}})
    check_compiler(settings)
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_compiler(Settings())
    with pytest.raises(
        SettingsError, match="needs a C\\+\\+ compiler and there is no no-such-compiler; install one, name yours in CXX"
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


def test_a_compiled_layer_computes_the_same(data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # so that it does compile
    plain = trace(ci_settings(Path("unused"), data, *SHORT, ONE_LAYER))
    compiled = trace(ci_settings(Path("unused"), data, *SHORT, ONE_LAYER, COMPILE))
    assert list(tmp_path.rglob("*.cpp"))
    assert_alike(compiled, plain)


@pytest.mark.parity
def test_compiled_layers_of_every_kind(data: Path) -> None:
    plain, compiled, recomputed = traces(
        [ci_settings(Path("unused"), data, *SHORT, *also) for also in ([], [COMPILE], [COMPILE, "train.recompute=full"])]
    )
    assert_alike(compiled, plain)
    assert recomputed.losses == compiled.losses
    assert all(torch.equal(value, compiled.state[name]) for name, value in recomputed.state.items())


@pytest.mark.parity
@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.ep=2", "parallel.reshard_after_forward=true"],
    ],
    ids=" ".join,
)
def test_compiled_layers_over_two_ranks(data: Path, layout: list[str]) -> None:
    runs = [ci_settings(Path("unused"), data, *SHORT, *layout, *compiled) for compiled in ([], [COMPILE])]
    for plain, compiled in run_on_ranks(traces, 2, runs, timeout=280):
        assert_alike(compiled, plain)
