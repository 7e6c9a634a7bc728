from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from hybridtrain.data import encode
from hybridtrain.data import prepare as prepare_module
from hybridtrain.data.prepare import ensure_prepared, prepare
from hybridtrain.data.shards import TokenDataset
from hybridtrain.data.tokenizer import load_tokenizer
from hybridtrain.errors import DataError
from hybridtrain.settings.tree import DataSettings
from tests.console import hybridtrain, refused

SETTINGS: dict[str, Any] = {
    "vocab_size": 320,
    "validation_fraction": 0.2,
    "shard_tokens": 1500,
    "progress": False,
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def split_documents(folder: Path, split: Any) -> list[str]:
    """The texts of a split, decoded."""
    dataset = TokenDataset.open(folder, verify=True)
    tokens = dataset.split(split)
    ids, starts = tokens.window(0, tokens.num_tokens)
    tokenizer = load_tokenizer(dataset.tokenizer_path)
    parts = np.split(ids, np.flatnonzero(starts))[1:]
    assert all(part[0] == dataset.manifest.separator_id for part in parts)
    return [tokenizer.decode(part[1:].tolist(), skip_special_tokens=False) for part in parts]


def test_every_document_is_in_one_split_and_reads_back(folder: Path, corpus: tuple[Path, list[str]]) -> None:
    train, validation = split_documents(folder, "train"), split_documents(folder, "validation")
    assert sorted(train + validation) == sorted(corpus[1])
    assert [text for text in corpus[1] if text in set(train)] == train
    manifest = TokenDataset.open(folder, verify=True).manifest
    assert (manifest.train.documents, manifest.validation.documents) == (len(train), len(validation))
    assert 5 <= len(validation) <= 20
    assert manifest.train.bytes == sum(len(text.encode()) for text in train)
    assert manifest.validation.bytes == sum(len(text.encode()) for text in validation)
    assert len(manifest.train.shards) > 3
    assert all(shard.tokens >= 1500 for shard in manifest.train.shards[:-1])
    assert manifest.dtype == "uint16"
    assert manifest.compressed_size == manifest_compressed(folder)
    assert not list(folder.glob("*.part"))
    assert not (folder / "journal.json").exists()


def manifest_compressed(folder: Path) -> int:
    return len(np.unique(np.load(folder / "compression.npy")))


def test_a_second_call_does_nothing(
    folder: Path, corpus: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != ".lock"}
    prepare([corpus[0]], folder, **SETTINGS)
    assert "nothing to do" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != ".lock"} == before
    with pytest.raises(DataError, match=r"already holds data of other sources or settings; .* --overwrite"):
        prepare([corpus[0]], folder, **(SETTINGS | {"shard_tokens": 1501}))


def test_overwrite_replaces_everything(folder: Path, corpus: tuple[Path, list[str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    prepare([corpus[0]], out, **(SETTINGS | {"shard_tokens": 10**6}), overwrite=True)
    assert sorted(path.name for path in out.glob("*.tokens")) == [
        "train-00000.tokens",
        "validation-00000.tokens",
    ]
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(corpus[0].read_bytes() + b"oops\n")
    with pytest.raises(DataError, match=r"bad.jsonl:61: is not JSON"):
        prepare([bad], out, **SETTINGS, overwrite=True)
    TokenDataset.open(out, verify=True)  # the old data outlives sources that are refused before encoding


def test_a_long_text_is_one_document(tmp_path: Path) -> None:
    text = "a text of many pieces, " * 20_000
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(text + name, encoding="utf-8")
    manifest = prepare([tmp_path], tmp_path / "out", **SETTINGS)
    assert (manifest.train.documents, manifest.validation.documents) == (1, 1)
    assert len(manifest.train.shards) > 1
    assert sorted(
        split_documents(tmp_path / "out", "train") + split_documents(tmp_path / "out", "validation")
    ) == [
        text + "a",
        text + "b",
    ]


def test_a_source_that_changes_while_read_is_refused(
    corpus: tuple[Path, list[str]], tmp_path: Path, monkeypatch: Any
) -> None:
    source = tmp_path / "corpus.jsonl"
    shutil.copy(corpus[0], source)
    real = encode._encoded

    def touched(tokenizer: Any, pieces: Any) -> Iterator[Any]:
        yield from real(tokenizer, pieces)
        os.utime(source, ns=(0, 0))

    monkeypatch.setattr(encode, "_encoded", touched)
    with pytest.raises(DataError, match=r"corpus.jsonl: changed while it was read"):
        prepare([source], tmp_path / "out", **SETTINGS)


def test_validation_sources_are_held_out_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("train on this " * 50, encoding="utf-8")
    (tmp_path / "b.txt").write_text("validate on that " * 50, encoding="utf-8")
    with pytest.raises(DataError, match=r"corpus is one document"):
        prepare([tmp_path / "a.txt"], tmp_path / "none", **SETTINGS)
    prepare([tmp_path / "a.txt"], tmp_path / "out", validation_sources=[tmp_path / "b.txt"], **SETTINGS)
    assert split_documents(tmp_path / "out", "train") == ["train on this " * 50]
    assert split_documents(tmp_path / "out", "validation") == ["validate on that " * 50]
    manifest = prepare([tmp_path / "a.txt"], tmp_path / "zero", **(SETTINGS | {"validation_fraction": 0.0}))
    assert (manifest.validation.tokens, manifest.validation.shards) == (0, ())
    assert TokenDataset.open(tmp_path / "zero", verify=True).split("validation").num_tokens == 0


def test_a_given_tokenizer_is_used_and_kept(
    tmp_path: Path, corpus: tuple[Path, list[str]], deepseek_tokenizer: Path
) -> None:
    settings = {"validation_fraction": 0.2, "progress": False}
    manifest = prepare(
        [corpus[0]],
        tmp_path / "out",
        tokenizer=deepseek_tokenizer,
        separator="<｜end▁of▁sentence｜>",
        **settings,
    )
    assert (manifest.vocab_size, manifest.compressed_size, manifest.dtype) == (129_280, 99_092, "uint32")
    assert (manifest.separator, manifest.separator_id) == ("<｜end▁of▁sentence｜>", 1)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == deepseek_tokenizer.read_bytes()
    assert sorted(
        split_documents(tmp_path / "out", "train") + split_documents(tmp_path / "out", "validation")
    ) == sorted(corpus[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 100}, "vocab_size=100 is too small"),
        ({"shard_tokens": 0}, "shard_tokens=0 must be at least 1"),
        ({"validation_fraction": 1.5}, "validation_fraction=1.5 must be"),
        ({"separator": "<none>"}, "separator '<none>' is not a token"),
        ({"tokenizer": "no/tokenizer.json"}, "no/tokenizer.json: the tokenizer cannot be read"),
        ({"text_field": "body"}, r"has no field 'body'; its fields are 'id', 'text' \(--text-field\)"),
    ],
)
def test_bad_settings_are_refused(
    corpus: tuple[Path, list[str]], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepare([corpus[0]], tmp_path / "out", **(SETTINGS | settings))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_text_that_comes_out_as_the_separator_is_refused(tmp_path: Path) -> None:
    """Of a tokenizer that knows how to spell its separator, which also stands for all it does not know."""
    tokenizer = Tokenizer(
        models.BPE(
            {"<unk>": 0} | {char: n for n, char in enumerate("<unk>abAUNKB ", 1)}, [], unk_token="<unk>"
        )
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "a b"}\n{"text": "a ☃"}\n', encoding="utf-8")
    arguments = {
        "tokenizer": tmp_path / "tokenizer.json",
        "separator": "<unk>",
        "validation_fraction": 0.0,
        "progress": False,
    }
    with pytest.raises(DataError, match=r"a.jsonl: document 2 of all has the separator in its text"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", **arguments)


def test_a_file_in_the_folder_s_place_is_refused(corpus: tuple[Path, list[str]]) -> None:
    with pytest.raises(DataError, match=r"corpus.jsonl: cannot be written"):
        prepare([corpus[0]], corpus[0], **SETTINGS)


def _ensure(data: DataSettings, results: Any) -> None:
    real = prepare_module._prepare

    def counted(*args: Any, **kwargs: Any) -> Any:
        results.put("prepared")
        return real(*args, **kwargs)

    prepare_module._prepare = counted
    ensure_prepared(data, progress=False)
    TokenDataset.open(data.path, verify=True)
    results.put("done")


def test_of_two_processes_one_prepares(corpus: tuple[Path, list[str]], tmp_path: Path) -> None:
    data = DataSettings(path=str(tmp_path / "out"), source=(str(corpus[0]),), vocab_size=320)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_ensure, args=(data, results)) for _ in range(2)]
    for process in processes:
        process.start()
    got = [results.get(timeout=60) for _ in range(3)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(got) == ["done", "done", "prepared"]


def test_ensure_prepared_leaves_finished_and_sourceless_folders_alone(folder: Path, tmp_path: Path) -> None:
    before = contents(folder)
    ensure_prepared(DataSettings(path=str(folder), source=("no/such/file.txt",)))
    assert contents(folder) == before
    ensure_prepared(DataSettings(path=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused(corpus: tuple[Path, list[str]], tmp_path: Path) -> None:
    with (
        prepare_module.locked(tmp_path / "out"),
        pytest.raises(
            DataError, match=r"out is in use by process \d+ on .* since .* UTC \(.*\); wait for it, end it"
        ),
    ):
        prepare([corpus[0]], tmp_path / "out", **SETTINGS)


def test_empty_names_are_refused_and_not_taken_for_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    for arguments, name in ((["", "--out", "o"], "SOURCE"), (["a.txt", "--out", ""], "--out")):
        assert f"{name} is empty; name a folder or file" in refused(hybridtrain("data", *arguments))
    assert os.listdir() == ["a.txt"]


def test_options_that_leave_each_other_nothing_to_say_are_refused(tmp_path: Path) -> None:
    options = [
        "--vocab-size",
        "300",
        "--tokenizer",
        "t.json",
        "--validation",
        "held.txt",
        "--validation-fraction",
        "0.1",
    ]
    message = refused(hybridtrain("data", "a.txt", "--out", str(tmp_path / "out"), *options))
    assert (
        "--vocab-size 300 and --tokenizer t.json: a loaded tokenizer has its own vocabulary, leave one out"
        in message
    )
    assert "--validation-fraction 0.1 and --validation held.txt: either is held out, leave one out" in message
    assert not (tmp_path / "out").exists()
