"""Safetensors folders: shards of a bounded size, and what is missing or damaged is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hybridtrain.checkpoint.stored import LazyTensor
from hybridtrain.errors import DataError, UserError
from hybridtrain.formats.folder import parse_size
from hybridtrain.formats.shards import SafetensorsFolder, write_safetensors

VALUES = {
    f"t{i}": torch.arange(rows * 4, dtype=torch.float32).view(rows, 4) + i
    for i, rows in enumerate((3, 1, 20, 2, 2))
}


def lazy(name: str, made: list[str]) -> LazyTensor:
    def make() -> torch.Tensor:
        made.append(name)
        return VALUES[name]

    return LazyTensor(tuple(VALUES[name].shape), torch.float32, make)


def test_shards_keep_to_their_size_and_each_tensor_is_made_once(tmp_path: Path) -> None:
    made: list[str] = []
    write_safetensors(tmp_path, {name: lazy(name, made) for name in VALUES}, max_shard_bytes=64)
    assert made == list(VALUES)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [weight_map[name] for name in VALUES] == [
        files[0],
        files[0],
        files[1],
        files[2],
        files[2],
    ]  # t2 alone is larger
    read = SafetensorsFolder(tmp_path)
    assert all(torch.equal(read.read(name), value) for name, value in VALUES.items())
    assert read.shapes["t2"] == (20, 4)

    (tmp_path / files[0]).unlink()
    (tmp_path / files[2]).write_bytes(b"\0" * 20)
    with pytest.raises(DataError) as caught:
        SafetensorsFolder(tmp_path)
    assert f"{files[0]}: is named in model.safetensors.index.json and missing" in str(caught.value)
    assert f"{files[2]}: is damaged" in str(caught.value)


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    write_safetensors(tmp_path, {name: lazy(name, []) for name in VALUES}, max_shard_bytes=10**6)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert torch.equal(SafetensorsFolder(tmp_path).read("t4"), VALUES["t4"])
    with pytest.raises(
        DataError, match=r"has neither model\.safetensors\.index\.json nor model\.safetensors"
    ):
        SafetensorsFolder(tmp_path / "nothing")


def test_a_tensor_that_stands_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    entries = [f'"t":{{"dtype":"{dtype}","shape":[2],"data_offsets":[0,4]}}' for dtype in ("F16", "BF16")]
    header = f"{{{','.join(entries)}}}".encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(DataError, match="the key 't' stands twice"):
        SafetensorsFolder(tmp_path)


def test_sizes() -> None:
    assert [parse_size("--max-shard-size", text) for text in ("5GB", "5G", "200mb", "64 KB", "7")] == [
        5 * 10**9,
        5 * 10**9,
        2 * 10**8,
        64_000,
        7,
    ]
    for text in ("5T", "0MB", "-1", "five"):
        with pytest.raises(UserError, match="write a number of bytes with KB, MB or GB"):
            parse_size("--max-shard-size", text)
