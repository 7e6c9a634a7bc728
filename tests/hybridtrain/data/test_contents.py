from __future__ import annotations

import gzip
import json
import lzma
import os
from pathlib import Path

import pytest

from hybridtrain.data.manifest import read_manifest
from hybridtrain.data.prepare import ensure_prepared, prepare
from hybridtrain.errors import DataError
from hybridtrain.settings.tree import DataSettings
from tests.hybridtrain.data import zoo

LINES = "".join(json.dumps({"body": f"document {number} über"}) + "\n" for number in range(10))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of ten documents in lines, one text, and what is not read."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n" + LINES + "\n", encoding="utf-8")
    (folder / "b.txt").write_text("a text", encoding="utf-8")
    (folder / "c.pdf").touch()
    (folder / "empty.txt").touch()
    return folder


def test_a_preparation_ends_with_what_was_read_and_left_out(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {"vocab_size": 300, "text_field": "body", "validation_fraction": 0.3, "progress": False}
    manifest = prepare([texts, texts / "b.txt"], tmp_path / "out", **made)
    said = capsys.readouterr().err
    size = sum(len(f"document {number} über".encode()) for number in range(10)) + len("a text")
    splits = manifest.train, manifest.validation
    assert sum(split.documents for split in splits) == 11
    assert sum(split.bytes for split in splits) == size
    assert (
        f"2 files ({sum(path.stat().st_size for path in texts.iterdir()):,} bytes), 11 documents, {size:,} "
        "bytes of text" in said
    )
    for name, split in zip(("train     ", "validation"), splits, strict=True):
        assert (
            f"{name}  {split.documents} documents, {split.bytes:,} bytes of text, {split.tokens:,} tokens, 1 "
            "shards" in said
        )
    expected = (
        "3 files: 1 unknown suffix (.pdf), 1 empty (0 bytes) ({0}), 1 named or linked more than once ({1}); "
        "2 blank lines"
    )
    assert "left out    " + expected.format(texts / "empty.txt", texts / "b.txt") in said
    assert manifest.left_out == {
        "unknown suffix": 1,
        "empty (0 bytes)": 1,
        "named or linked more than once": 1,
        "blank lines": 2,
    }
    assert read_manifest(tmp_path / "out") == manifest
    prepare([texts, texts / "b.txt"], tmp_path / "out", **made)
    assert "2 blank lines" in capsys.readouterr().err


def test_copies_are_told_and_refused_where_they_leak(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (texts / "copy.txt").write_text("a text", encoding="utf-8")
    (texts / "a.jsonl").unlink()
    prepare([texts], tmp_path / "out", vocab_size=300, progress=False)
    assert (
        f"1 file(s) are copies, and are read as well: {texts / 'copy.txt'} has the bytes of {texts / 'b.txt'}"
        in capsys.readouterr().err
    )
    with pytest.raises(
        DataError,
        match=r"text of the corpus is in the validation text too; .*\n  .*copy.txt has the bytes of .*b.txt",
    ):
        prepare(
            [texts / "b.txt"],
            tmp_path / "leak",
            validation_sources=[texts / "copy.txt"],
            vocab_size=300,
            progress=False,
        )
    os.link(texts / "b.txt", tmp_path / "linked.txt")
    with pytest.raises(DataError, match=r"linked.txt: is both in the corpus and in the validation text"):
        prepare(
            [texts / "b.txt"],
            tmp_path / "leak",
            validation_sources=[tmp_path / "linked.txt"],
            vocab_size=300,
            progress=False,
        )


def test_a_text_and_its_compressed_copy_are_told_and_refused_where_they_leak(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("a text")
    (texts / "b.txt").write_text("another")
    (texts / "a.TXT.GZ").write_bytes(gzip.compress(b"a text"))
    (texts / "b.txt.xz").write_bytes(lzma.compress(b"not that of b.txt"))
    prepare([texts], tmp_path / "out", vocab_size=300, progress=False)
    said = capsys.readouterr().err
    assert "1 file(s) are copies, and are read as well: " in said
    assert all(str(texts / name) in said for name in ("a.txt", "a.TXT.GZ"))
    with pytest.raises(
        DataError, match=r"in the validation text too; .*\n  .*a.TXT.GZ has the bytes of .*a.txt"
    ):
        prepare(
            [texts / "a.txt"],
            tmp_path / "other",
            validation_sources=[texts / "a.TXT.GZ"],
            vocab_size=300,
            progress=False,
        )


def test_a_run_prepares_with_all_that_the_command_can_say(texts: Path, tmp_path: Path) -> None:
    zoo.tokenizer("gpt-4").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "held.txt").write_text("held out", encoding="utf-8")
    data = DataSettings(
        path=str(tmp_path / "run"),
        source=(str(texts / "a.jsonl"),),
        validation=(str(tmp_path / "held.txt"),),
        tokenizer=str(tmp_path / "tokenizer.json"),
        separator="<s>",
        text_field="body",
        shard_tokens=20,
    )
    ensure_prepared(data, progress=False)
    prepare(
        data.source,
        tmp_path / "command",
        tokenizer=data.tokenizer,
        separator="<s>",
        validation_sources=data.validation,
        text_field="body",
        shard_tokens=20,
        progress=False,
    )
    ours, theirs = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("run", "command")
    )
    assert ours == theirs
    assert len([name for name in ours if name.endswith(".tokens")]) > 2


def test_a_finished_folder_is_compared_with_the_settings(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo.tokenizer("gpt-4").save(str(tmp_path / "tokenizer.json"))
    zoo.tokenizer("words").save(str(tmp_path / "other.json"))
    source, path = (str(texts / "a.jsonl"),), str(tmp_path / "out")
    prepare(
        source,
        path,
        tokenizer=tmp_path / "tokenizer.json",
        separator="<s>",
        text_field="body",
        progress=False,
    )
    made = {
        "path": path,
        "source": source,
        "tokenizer": str(tmp_path / "tokenizer.json"),
        "separator": "<s>",
        "text_field": "body",
    }
    capsys.readouterr()
    for same in (made, {"path": path, "source": source}, {"path": path, "separator": "</s>"}):
        ensure_prepared(DataSettings.model_validate(same))
        assert capsys.readouterr().err == ""
    with pytest.raises(DataError) as caught:
        ensure_prepared(
            DataSettings.model_validate(
                made | {"separator": "</s>", "tokenizer": str(tmp_path / "other.json")}
            )
        )
    lines = str(caught.value).splitlines()
    assert lines[0] == f"data.path={path} was made with other settings than those of the run"
    assert lines[1] == "  data.separator='</s>', and the folder has '<s>' before each document"
    assert lines[2].startswith(f"  data.tokenizer={tmp_path / 'other.json'} is another one (xxh3 ")
    other = {"source": (str(texts / "b.txt"),), "text_field": "words", "validation_fraction": 0.5}
    ensure_prepared(DataSettings.model_validate(made | other))
    size = (texts / "a.jsonl").stat().st_size
    told = f"data.source is 1 files of 6 bytes, and was 1 files of {size} bytes"
    assert (
        f"data.text_field is words, and was body; data.validation_fraction is 0.5, and was 0.05; {told}"
        in capsys.readouterr().err
    )
