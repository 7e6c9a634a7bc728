"""A checkpoint's tensors one by one: any rows of any layout's pieces, and checkpoints written without a
model.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hybridtrain import checkpoint
from hybridtrain.checkpoint.stored import LazyTensor, StoredTensors, write_tensors
from hybridtrain.errors import CheckpointError
from hybridtrain.run.generate import open_checkpoint
from tests.hybridtrain.conftest import TWO_RANKS
from tests.ranks import run_on_ranks


@pytest.mark.parametrize("nproc", [1, 2])
def test_reads_what_a_load_reads_whatever_layout_wrote_it(trained: Callable[..., Path], nproc: int) -> None:
    folder = trained(nproc, *(TWO_RANKS if nproc == 2 else ()))
    last = checkpoint.latest(folder / "checkpoints")
    assert last is not None
    stored = StoredTensors(last)
    run, _, _ = open_checkpoint(folder)
    assert run.table is not None
    expected = {f"model.{k}": v for k, v in run.model.state_dict().items()}
    expected |= {f"table.{k}": v for k, v in run.table.state().items()}
    assert expected.keys() <= stored.shapes.keys()
    for name, value in expected.items():
        assert stored.shapes[name] == tuple(value.shape)
        assert torch.equal(stored.read(name), value), name
    rows = len(run.table.table)
    for low, high in ((0, 1), (rows // 2 - 3, rows // 2 + 3), (rows - 1, rows), (5, 5)):
        assert torch.equal(stored.read("table.rows", low, high), run.table.table[low:high])
    step = next(name for name in stored.shapes if name.endswith(".step"))
    assert stored.read(step) == 20  # a tensor without dims


def peak_of_a_large_checkpoint(folder: Path) -> tuple[int, int, bool]:
    """Peak bytes of this process before and after writing a 960 MB checkpoint of 12 MB tensors; and whether
    it reads.
    """

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    whole = LazyTensor((1000, 3000), torch.float32, lambda: torch.ones(1000, 3000))
    write_tensors(folder / "one", {"t": whole})  # what a first time imports and keeps
    start = peak()
    write_tensors(folder / "many", {f"t{i}": whole for i in range(80)})
    return start, peak(), bool((StoredTensors(folder / "many").read("t7", 500, 501) == 1).all())


def test_memory_is_bounded_by_a_tensor_and_not_by_the_model(tmp_path: Path) -> None:
    ((start, end, right),) = run_on_ranks(peak_of_a_large_checkpoint, 1, tmp_path)
    assert right
    assert sum(p.stat().st_size for p in (tmp_path / "many").iterdir()) > 960 * 10**6
    assert end - start < 240 * 10**6  # a quarter


def test_a_tensor_that_is_made_otherwise_than_planned_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"made \[2\] torch.float32, planned \[3\]"):
        write_tensors(tmp_path, {"t": LazyTensor((3,), torch.float32, lambda: torch.ones(2))})


def test_damage_is_named(tmp_path: Path) -> None:
    write_tensors(tmp_path, {"t": LazyTensor((3,), torch.float32, lambda: torch.ones(3))})
    (file,) = tmp_path.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="damaged: t cannot be read"):
        StoredTensors(tmp_path).read("t")
    (tmp_path / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match="damaged: its index of tensors cannot be read"):
        StoredTensors(tmp_path)
