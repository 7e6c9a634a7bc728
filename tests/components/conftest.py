"""Data and settings of runs with components from outside of the package."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hybridtrain.settings.tree import Settings
from tests.training import CI, TINY, ci_settings, make_data

EXAMPLES = Path(__file__).parents[2] / "examples"
LAYERS = 'model.layers=["gated_recurrence+dense", "engram+attention+moe", "gated_recurrence+moe"]'


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data folder. Read only."""
    return make_data(tmp_path_factory.mktemp("components") / "data", documents=300)


def overrides_of(examples: Path) -> list[str]:
    """Of configs/ci.toml for a tiny run of both examples, whose files are in the folder `examples`."""
    files = [str(examples / "gated_recurrence.py"), str(examples / "scaled_residual.py")]
    ours = [f"model.components={files}", LAYERS, "model.residual=scaled_residual"]
    return [*TINY, *ours, "model.gated_recurrence.width=32"]


@pytest.fixture
def settings_of(data: Path, tmp_path: Path) -> Callable[..., Settings]:
    """`settings_of(name, *overrides)`: a tiny run of both examples in the folder `name`."""

    def settings(name: str, *overrides: str) -> Settings:
        return ci_settings(tmp_path / name, data, *overrides_of(EXAMPLES), *overrides)

    return settings


@pytest.fixture
def train_command(data: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """`train_command(name, *overrides)`: settings file and overrides of such a run as a user gives them, with
    the examples in a folder of the user's.
    """
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("gated_recurrence.py", "scaled_residual.py"):
        shutil.copy(EXAMPLES / name, mine)

    def command(name: str, *overrides: str) -> list[str]:
        where = [f"run.dir={tmp_path / name}", f"data.path={data}", "data.source=[]"]
        return [str(CI), *where, *overrides_of(mine), *overrides]

    return command
