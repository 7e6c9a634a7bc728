"""Data and settings of runs with components from outside of the package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hybridtrain.settings.tree import Settings
from tests.training import TINY, ci_settings, make_data

EXAMPLES = Path(__file__).parents[2] / "examples"
LAYERS = 'model.layers=["gated_recurrence+dense", "engram+attention+moe", "gated_recurrence+moe"]'


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data folder. Read only."""
    return make_data(tmp_path_factory.mktemp("components") / "data")


@pytest.fixture
def settings_of(data: Path, tmp_path: Path) -> Callable[..., Settings]:
    """`settings_of(name, *overrides)`: a tiny run of both examples in the folder `name`."""
    files = [str(EXAMPLES / "gated_recurrence.py"), str(EXAMPLES / "scaled_residual.py")]

    def settings(name: str, *overrides: str) -> Settings:
        components = f"model.components={files}"
        ours = [components, LAYERS, "model.residual=scaled_residual", "model.gated_recurrence.width=32"]
        return ci_settings(tmp_path / name, data, *TINY, *ours, *overrides)

    return settings
