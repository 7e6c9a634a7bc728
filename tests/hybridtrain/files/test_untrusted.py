"""JSON of others is read within bounds; paths that it names stay in their folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from hybridtrain.files.untrusted import UntrustedFileError, inside, parse_json, read_json


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested deeper than 64"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested deeper than 64"),
        ("1" * 5_000, "not JSON"),
        ('{"a": 1, "a": 2}', "the key 'a' stands twice"),
        ("[1, 2]", "the whole: Input should be a valid dictionary"),
        (b"\xff\xfe", "not JSON"),
        ("", "not JSON"),
        ("{} {}", "not JSON"),
    ],
)
def test_what_is_no_plain_object_is_refused(text: str | bytes, why: str) -> None:
    with pytest.raises(UntrustedFileError, match=why):
        parse_json(text, "some.json", dict[str, Any])


def test_every_wrong_value_is_named() -> None:
    with pytest.raises(UntrustedFileError) as caught:
        parse_json('{"a": 1, "b": "2", "c": null}', "some.json", dict[str, int])
    assert "some.json" in str(caught.value)
    assert "b: " in str(caught.value)
    assert "c: " in str(caught.value)
    assert "a: " not in str(caught.value)


def test_a_long_file_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    path.write_text(" " * 1000)
    with pytest.raises(UntrustedFileError, match=r"longer than 999 bytes"):
        read_json(path, dict[str, Any], most=999)


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/../../x", "", "..", "a\0b", "..\\x", "c:\\x", "file:///etc/passwd", "\ud800"],
)
def test_paths_outside_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UntrustedFileError, match=r"index\.json: names the file"):
        inside(tmp_path, name, "index.json")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UntrustedFileError, match=r"pipe\.json: is not a regular file"):
        read_json(tmp_path / "pipe.json", dict[str, Any])
    with pytest.raises(UntrustedFileError, match="is not a regular file"):
        read_json(Path("/dev/zero"), dict[str, Any])


def test_paths_below_are_taken(tmp_path: Path) -> None:
    assert inside(tmp_path, "model-00001-of-00002.safetensors", "index.json").parent == tmp_path
    assert inside(tmp_path, "a/b..c", "index.json") == tmp_path / "a" / "b..c"
