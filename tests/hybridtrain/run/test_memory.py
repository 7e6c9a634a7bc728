"""A model that a rank cannot hold is refused before it is allocated, with what would fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybridtrain.errors import SettingsError
from hybridtrain.parallel.layout import Degrees, Layout
from hybridtrain.run.memory import bytes_held, check_memory, device_bytes
from tests.training import ci_settings

N = 1000


@pytest.mark.parametrize(
    ("zero", "dtype", "expected"),
    [
        (0, torch.float32, 16 * N),
        (1, torch.float32, 8 * N + 8 * N // 4),
        (3, torch.float32, 16 * N // 4),
        (0, torch.bfloat16, 18 * N),
        (1, torch.bfloat16, 6 * N + 12 * N // 4),
        (3, torch.bfloat16, 16 * N // 4),
    ],
)
def test_bytes_are_those_of_the_docs(zero: int, dtype: torch.dtype, expected: int) -> None:
    assert bytes_held(zero, N, Layout.resolve(4, Degrees()), dtype) == expected


def test_axes_that_cut_parameters_divide_them() -> None:
    layout = Layout.resolve(16, Degrees(pp=2, tp=2, ep=2, dp_replicate=2))
    assert bytes_held(0, 8 * N, layout, torch.float32) == 16 * N
    assert bytes_held(3, 8 * N, layout, torch.float32) == 16 * N // layout.fsdp


def test_what_does_not_fit_is_refused_with_what_does(ci_data: Path, tmp_path: Path) -> None:
    settings = ci_settings(tmp_path / "run", ci_data, "parallel.ep=1", "parallel.mem=1")
    layout = Layout.resolve(1, Degrees(mem=1))
    check_memory(settings, layout, 512, torch.float32, 1 << 30)
    with pytest.raises(SettingsError, match=r"parallel\.zero=1 needs at least .* GiB a rank .*more ranks"):
        check_memory(settings, layout, 512, torch.float32, 1 << 10)


def test_ranks_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    whole = device_bytes(torch.device("cpu"), 1)
    assert whole > 1 << 28
    assert device_bytes(torch.device("cpu"), 4) == whole // 4
