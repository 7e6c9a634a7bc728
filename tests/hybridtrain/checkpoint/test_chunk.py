"""What is said of a stored chunk without its bytes, and a chunk that is written in parts."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.serialization import config

from hybridtrain.checkpoint.chunk import StoredChunk, byte_view, frame
from hybridtrain.files.untrusted import UntrustedFileError

TENSORS = {
    "rows": torch.randn(35, 7),
    "turned": torch.randn(3, 2).T,
    "scalar": torch.tensor(3.0),
    "none": torch.empty(0, 3),
    "half": torch.randn(5, 2).bfloat16(),
    "newer": torch.arange(6).to(torch.uint16),  # torch describes this dtype in another way
    "bool": torch.tensor([True, False, True]),
    "behind": torch.arange(5.0)[2:],
}


def stored(folder: Path, value: object) -> SimpleNamespace:
    """As an entry of an index says it, behind other bytes."""
    content = io.BytesIO()
    torch.save(value, content)
    (folder / "file").write_bytes(b"xyz" + content.getvalue())
    return SimpleNamespace(relative_path="file", offset=3, length=len(content.getvalue()))


@pytest.mark.parametrize("name", TENSORS)
def test_a_piece_is_what_torch_saved(name: str, tmp_path: Path) -> None:
    value = TENSORS[name]
    chunk = StoredChunk.find(tmp_path, stored(tmp_path, value), value.shape, value.dtype)
    assert (chunk.shape, chunk.stride, chunk.dtype) == (tuple(value.shape), value.stride(), value.dtype)
    assert torch.equal(chunk.read(0, len(value) if value.dim() else 1), value)


def test_what_is_no_tensor_is_not_taken_for_one(tmp_path: Path) -> None:
    with pytest.raises(UntrustedFileError, match=r"names pathlib\.\S*Path, which is not part"):
        StoredChunk.find(tmp_path, stored(tmp_path, tmp_path), (), torch.float32)


@pytest.mark.parametrize("name", sorted(TENSORS.keys() - {"turned", "behind"}))
def test_a_frame_and_the_bytes_are_what_torch_writes(name: str) -> None:
    value: Tensor = TENSORS[name]
    whole = io.BytesIO()
    head, tail = frame(tuple(value.shape), value.dtype)
    with config.patch({"save.compute_crc32": False}):
        torch.save(value, whole)
    assert head + bytes(byte_view(value)) + tail == whole.getvalue()
