"""Files of tensors: their records are of what is written, and rows are read from wherever they lie."""

from __future__ import annotations

import errno
import io
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

from hybridtrain import checkpoint
from hybridtrain.checkpoint import blocks
from hybridtrain.checkpoint.blocks import BlockPlanner
from hybridtrain.checkpoint.files import Reader, Writer, _Files, quiet
from hybridtrain.checkpoint.saved import Saved
from hybridtrain.checkpoint.stored import StoredTensors
from hybridtrain.files.durable import file_record

TENSORS = {
    "table": torch.arange(1003 * 7, dtype=torch.float32).view(1003, 7),
    "turned": torch.arange(60.0).view(6, 10).T,
    "half": torch.arange(50).to(torch.bfloat16).view(25, 2),
    "count": torch.tensor(5, dtype=torch.int32),
    "none": torch.empty(0, 3),
    "row": torch.arange(5000, dtype=torch.int64).view(1, 5000),
}


def save(path: Path, tensors: dict[str, Tensor], sources: dict[str, Any] | None = None) -> Writer:
    writer = Writer(path)
    with quiet():
        state_dict_saver.save(
            dict(tensors), storage_writer=writer, planner=BlockPlanner(sources or tensors), no_dist=True
        )
    return writer


@pytest.fixture(params=["folder", "url"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return (
        tmp_path / "c"
        if request.param == "folder"
        else checkpoint.open_storage(f"memory://{tmp_path.name}/c")
    )


def test_what_is_written_in_blocks_is_read_whole_and_in_part(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    writer = save(folder, TENSORS)
    assert set(writer.records) == {"__0_0.distcp", ".metadata"}
    for name, record in writer.records.items():
        found = file_record(folder / name)
        assert record == {"size": found.size, "xxh3": found.xxh3}
        assert found.size == len((folder / name).read_bytes())
    stored = StoredTensors(folder)
    assert len(stored._entries["table"].chunks) == 29  # of 35 rows of 28 bytes
    for name, value in TENSORS.items():
        assert torch.equal(stored.read(name), value), name
        assert stored.read(name).dtype == value.dtype
    for low, high in ((0, 1), (34, 36), (100, 300), (1002, 1003), (7, 7)):
        assert torch.equal(stored.read("table", low, high), TENSORS["table"][low:high])
    assert torch.equal(stored.read("turned", 3, 9), TENSORS["turned"][3:9])
    into = torch.zeros(5, 7, dtype=torch.float64)
    stored.read_into(into, "table", 33)
    assert torch.equal(into, TENSORS["table"][33:38].double())


def test_torch_reads_it_with_our_reader_and_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    save(tmp_path, TENSORS)
    parts = itertools.count()
    for storage in (
        {"storage_reader": Reader(tmp_path, Saved(tmp_path).index, lambda: next(parts) and None)},
        {"checkpoint_id": tmp_path},
    ):
        state = {name: torch.full_like(value, 9) for name, value in TENSORS.items()}
        with quiet():
            state_dict_loader.load(state, no_dist=True, **storage)
        for name, value in TENSORS.items():
            assert torch.equal(state[name], value), name
    assert next(parts) >= len(TENSORS)  # the watchdog hears of every one


def test_values_come_from_the_sources_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    asked: list[tuple[int, int]] = []

    def rows(low: int, high: int) -> Tensor:
        asked.append((low, high))
        return TENSORS["table"][low:high] + 1

    save(tmp_path, {"table": torch.empty(1003, 7, device="meta")}, {"table": rows})
    assert [low for low, _ in asked] == list(range(0, 1003, 35))
    assert [high for _, high in asked] == [*range(35, 1003, 35), 1003]
    assert torch.equal(StoredTensors(tmp_path).read("table"), TENSORS["table"] + 1)


def test_a_live_tensor_is_not_copied_to_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.arange(40.0).view(10, 4)
    part = blocks._alone(whole, 2, 5)
    assert part.data_ptr() == whole[2].data_ptr()
    assert part.untyped_storage().nbytes() == part.nbytes
    assert torch.equal(part, whole[2:5])
    assert torch.equal(blocks._alone(whole.T, 1, 3), whole.T[1:3])


class _SmallDisk(io.RawIOBase):
    """A file on a disk with room for so many bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, data: Any) -> int:
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(data)
        return len(data)


def test_a_disk_that_is_full_at_any_byte_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Torch's archive raises an error of its own where its end no longer fits."""
    whole = io.BytesIO()
    torch.save(torch.arange(100.0), whole)
    rooms = range(0, len(whole.getvalue()), 13)
    for room in rooms:
        monkeypatch.setattr(Path, "open", lambda path, mode, room=room: _SmallDisk(room))
        with (
            pytest.raises(OSError, match="No space left on device"),
            _Files().create_stream(tmp_path / "x", "wb") as stream,
        ):
            torch.save(torch.arange(100.0), stream)
    assert len(rooms) > 50
