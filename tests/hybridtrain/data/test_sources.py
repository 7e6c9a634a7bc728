"""Which files of a corpus are read, and what is told of the others."""

from __future__ import annotations

import errno
import gzip
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hybridtrain.data.documents import read_pieces
from hybridtrain.data.sources import list_files, summary
from hybridtrain.errors import DataError
from tests.hybridtrain.data.test_documents import documents


def test_folders_are_recursive_and_sorted(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.txt.gz", "notes.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(name.encode()) if name.endswith(".gz") else name.encode())
    assert documents(tmp_path) == ["a/b/c.txt.gz", "a/z.txt", "b.txt"]


def test_shipped_corpus() -> None:
    texts = documents("shipped:sotu")
    assert len(texts) == 233
    assert sum(len(text.encode()) for text in texts) == 10_761_413
    assert texts[0].startswith("Fellow-Citizens of the Senate and House of Representatives")


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "book.pdf").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    good = tmp_path / "good.txt"
    good.write_text("x", encoding="utf-8")
    names = ["missing.txt", "empty.txt", "book.pdf", "folder"]
    with pytest.raises(DataError) as caught:
        list_files([*(tmp_path / n for n in names), "shipped:poems", good], [good])
    message = str(caught.value)
    assert "sources: 6 problem(s)" in message
    for part in (
        "missing.txt: no such file or folder",
        "empty.txt: is empty (0 bytes)",
        "book.pdf: unknown suffix; legal are .txt, .jsonl, .ndjson, each also with .gz, .xz, .bz2",
        "folder: no file in this folder ends in .txt",
        "shipped:poems: no such corpus is shipped; there is shipped:sotu",
        "good.txt: is both in the corpus and in the validation text",
    ):
        assert part in message
    with pytest.raises(DataError, match="no source is given; name files, folders or shipped:sotu"):
        list_files([])


def test_every_file_of_a_folder_is_read_once_or_told(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for place in (folder / "sub", folder / ".git", elsewhere / "deep"):
        place.mkdir(parents=True)
    for name in (
        "texts/A.TXT",
        "texts/sub/b.JsonL",
        "texts/.hidden.txt",
        "texts/.git/c.txt",
        "elsewhere/d.txt",
        "elsewhere/deep/e.txt",
    ):
        (tmp_path / name).write_text(
            '{"text": "b"}' if name.endswith("L") else Path(name).stem, encoding="utf-8"
        )
    (folder / "f.txt.GZ").write_bytes(gzip.compress(b"f"))
    for name in ("notes.md", "book.pdf", "README"):
        (folder / name).write_text("x", encoding="utf-8")
    (folder / "empty.txt").touch()
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again.txt").symlink_to(folder / "A.TXT")
    (elsewhere / "deep" / "loop").symlink_to(folder)
    (folder / "sub" / "gone.txt").symlink_to(tmp_path / "gone.txt")
    (folder / "sub" / "itself.txt").symlink_to(folder / "sub" / "itself.txt")
    os.mkfifo(folder / "pipe.txt")
    listing = list_files([folder, folder / "sub", elsewhere / "d.txt", folder / "A.TXT"])
    texts = [piece.text for file in listing.corpus for piece in read_pieces(file)]
    assert texts == ["A", "f", "d", "e", "b"]
    left = Counter(entry.why for entry in listing.left_out)
    assert left == {
        "hidden": 2,
        "unknown suffix": 3,
        "empty (0 bytes)": 1,
        "broken link": 4,  # two, listed twice
        "not a regular file": 1,
        "named or linked more than once": 5,
    }
    line = summary(listing.left_out)
    assert line.startswith("16 files: ")
    assert "3 unknown suffix (README, .pdf, .md)" in line  # in the order of the names
    assert f"1 empty (0 bytes) ({folder / 'empty.txt'})" in line


def test_a_folder_that_gives_nothing_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x", encoding="utf-8")
    with pytest.raises(
        DataError, match=r"no file in this folder ends in .txt, .* left out: 1 file: 1 unknown suffix \(.md\)"
    ):
        list_files([tmp_path])
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match=r"pipe.txt: is not a regular file"):
        list_files([tmp_path / "pipe.txt"])


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    (tmp_path / "closed").mkdir()
    real = os.scandir

    def scandir(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"closed: cannot be read: Permission denied"):
        list_files([tmp_path])
