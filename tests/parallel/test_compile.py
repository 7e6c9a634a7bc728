"""Compiled layers: the same losses, the same traffic, and a refusal where there is no compiler."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridtrain.assemble import check_compiler
from hybridtrain.errors import SettingsError
from hybridtrain.settings import Settings
from tests.ranks import run_on_ranks
from tests.training import ci_settings, make_data, trace, traces

SHORT = ("train.micro_batches=2", "train.global_batch=8")
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
