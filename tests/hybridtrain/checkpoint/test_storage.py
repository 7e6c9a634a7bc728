"""Folders and URLs as paths."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hybridtrain.checkpoint.storage import (
    free_space,
    is_local,
    names_in,
    open_storage,
    remove_folder,
    write_whole,
)
from hybridtrain.errors import SettingsError


def test_folders_are_paths_also_as_urls(tmp_path: Path) -> None:
    assert open_storage("runs/one") == Path("runs/one")
    assert open_storage(f"file://{tmp_path}/one") == tmp_path / "one"
    assert is_local(open_storage(f"file://{tmp_path}"))
    assert "MiB free" in free_space(tmp_path / "not/there")


@pytest.mark.parametrize("where", ["memory://place", "local://{}/place"])
def test_a_url_has_the_methods_of_a_path(tmp_path: Path, where: str) -> None:
    folder = open_storage(where.format(tmp_path))
    assert not is_local(folder)
    assert free_space(folder) == ""
    assert list(names_in(folder)) == []
    remove_folder(folder)
    (folder / "a").mkdir(parents=True)
    write_whole(folder / "a" / "b", b"content")
    assert (folder / "a" / "b").read_bytes() == b"content"
    assert list(names_in(folder)) == ["a"]
    remove_folder(folder / "a")
    assert list(names_in(folder)) == []


def test_what_cannot_be_opened_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        SettingsError, match=r"checkpoint.dir=nowhere://x: 1 problem\(s\)\n  cannot be opened: .*nowhere"
    ):
        open_storage("nowhere://x")
    monkeypatch.setitem(sys.modules, "upath", None)
    with pytest.raises(SettingsError, match=r"URLs need the extra hybridtrain\[url\]"):
        open_storage("memory://x")
