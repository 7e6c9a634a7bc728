"""Files are written as a whole, and known again by their checksums."""

from __future__ import annotations

from pathlib import Path

import pytest
import xxhash

from hybridtrain.files import durable
from hybridtrain.files.durable import READ_BYTES, FileRecord, file_digest, file_record, write_atomically


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, b"old")

    def crash(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(durable.os, "fsync", crash)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("size", [0, 1, READ_BYTES, 2 * READ_BYTES + 3])
def test_a_record_is_of_all_bytes(tmp_path: Path, size: int) -> None:
    content, parts = bytes(i % 251 for i in range(size)), []
    (tmp_path / "a").write_bytes(content)
    record = file_record(tmp_path / "a", lambda: parts.append(1))
    assert record == FileRecord(size, xxhash.xxh3_128(content).hexdigest())
    assert len(parts) == -(-size // READ_BYTES)
    assert file_digest(tmp_path / "a") == record.xxh3


def test_a_missing_file_has_no_digest(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        file_digest(tmp_path / "a")
