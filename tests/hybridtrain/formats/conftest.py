"""An export to Megatron's format that several files of tests change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hybridtrain.formats.megatron_export import export_megatron
from tests.hybridtrain.formats.tiny import MEGATRON_RUNS, random_run


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory, ci_data: Path) -> tuple[Path, Path]:
    """(a run with every part that Megatron has, its export in several files). Read only."""
    root = tmp_path_factory.mktemp("moe")
    run = random_run(root / "run", ci_data, *MEGATRON_RUNS["glm4_moe"])
    export_megatron(run, root / "out", max_file_bytes=200_000)
    return run, root / "out"


@pytest.fixture
def exported(moe: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of that export to change."""
    return Path(shutil.copytree(moe[1], tmp_path / "exported"))
