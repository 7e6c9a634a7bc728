"""Training runs that several test files look at, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training import ci_settings, make_data, train_on

TWO_RANKS = ("parallel.ep=2", "parallel.mem=2")


@pytest.fixture(scope="session")
def ci_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data folder. Read only."""
    return make_data(tmp_path_factory.mktemp("ci") / "data")


@pytest.fixture(scope="session")
def trained(ci_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`trained(nproc, *overrides)`: the folder of that finished run of ci.toml. Read only: copy it before
    changing it.
    """
    folders: dict[tuple[object, ...], Path] = {}

    def run(nproc: int, *overrides: str) -> Path:
        key = (nproc, *overrides)
        if key not in folders:
            folder = tmp_path_factory.mktemp("run") / "run"
            train_on(nproc, ci_settings(folder, ci_data, *overrides))
            folders[key] = folder
        return folders[key]

    return run
