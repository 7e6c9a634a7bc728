"""Resharding between every pair of layouts (`make test-parity`): the same tensors, and the same step after a
load.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridtrain.reshard import reshard
from tests.hybridtrain.reshard.layouts import LAYOUTS, digests, next_losses, overrides
from tests.ranks import run_on_ranks
from tests.training import ci_settings, make_data, train_on

pytestmark = pytest.mark.parity

TRAINED = ("one rank", "ep 2 · mem 2", "tp 2 · ep 4")
"""Written by real runs at these layouts; the others by the tool."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("ci") / "data")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks, which all the others are made of."""
    return _train(TRAINED[1], data, tmp_path_factory.mktemp("run") / "run")


def _train(name: str, data: Path, folder: Path) -> Path:
    ranks = LAYOUTS[name][0]
    steps = ("train.steps=4", "checkpoint.every=4", "train.eval_every=0", "engram.weight_decay=0.1")
    train_on(ranks, ci_settings(folder, data, *overrides(name), *steps))
    return folder


@pytest.mark.parametrize("source", LAYOUTS)
def test_from_each_layout_to_each(source: str, run: Path, tmp_path: Path) -> None:
    expected = digests(run)
    reshard(run, tmp_path / "from", overrides(source), nproc=LAYOUTS[source][0])
    assert digests(tmp_path / "from") == expected
    for number, (target, (ranks, _)) in enumerate(LAYOUTS.items()):
        out = tmp_path / str(number)
        reshard(tmp_path / "from", out, overrides(target), nproc=ranks)
        assert digests(out) == expected, target


@pytest.mark.parametrize("source", TRAINED)
def test_from_what_a_run_wrote(source: str, data: Path, tmp_path: Path) -> None:
    run = _train(source, data, tmp_path / "run")
    expected = digests(run)
    for number, (target, (ranks, _)) in enumerate(LAYOUTS.items()):
        out = tmp_path / str(number)
        reshard(run, out, overrides(target), nproc=ranks)
        assert digests(out) == expected, target


@pytest.mark.parametrize("target", LAYOUTS)
def test_the_next_steps_are_those_of_a_load_of_the_old_files(
    target: str, run: Path, data: Path, tmp_path: Path
) -> None:
    ranks = LAYOUTS[target][0]
    reshard(run, tmp_path / "out", overrides(target), nproc=ranks)
    reshard(run, tmp_path / "one", overrides("one rank"), nproc=1)
    (alone,) = run_on_ranks(next_losses, 1, tmp_path / "one" / "settings.toml", [run])
    for losses in run_on_ranks(
        next_losses, ranks, tmp_path / "out" / "settings.toml", [run, tmp_path / "out"]
    ):
        assert losses[:2] == losses[2:]
        assert losses[:2] == pytest.approx(alone, rel=1e-5)
