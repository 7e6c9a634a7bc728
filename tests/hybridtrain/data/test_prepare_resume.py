"""A preparation that was cut off anywhere goes on to the same bytes, or is started over."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hybridtrain.data import encode
from hybridtrain.data import prepare as prepare_module
from hybridtrain.data.prepare import prepare
from hybridtrain.data.shards import TokenDataset
from hybridtrain.errors import DataError
from tests.hybridtrain.data.test_prepare import SETTINGS, contents


class Killed(Exception):
    pass


def test_an_interrupted_overwrite_leaves_no_finished_data(
    folder: Path, corpus: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    monkeypatch.setattr(encode, "_encoded", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        prepare([corpus[0]], out, **(SETTINGS | {"shard_tokens": 10**6}), overwrite=True)
    with pytest.raises(DataError, match="preparation is unfinished"):
        TokenDataset.open(out, verify=True)


@pytest.mark.parametrize("after", [0, 1, 7, 23, 59])
@pytest.mark.parametrize("commit_bytes", [1, 2500, 1 << 30])
def test_a_resumed_preparation_gives_the_same_bytes(
    folder: Path,
    corpus: tuple[Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
    commit_bytes: int,
) -> None:
    monkeypatch.setattr(encode, "_COMMIT_BYTES", commit_bytes)
    real = encode._encoded
    encoded: list[str] = []

    def killed_after(count: int) -> Callable[..., Iterator[Any]]:
        def run(tokenizer: Any, pieces: Any) -> Iterator[Any]:
            for number, item in enumerate(real(tokenizer, pieces)):
                if number == count:
                    raise Killed
                encoded.append(item[0].text)
                yield item

        return run

    out = tmp_path / "out"
    monkeypatch.setattr(encode, "_encoded", killed_after(after))
    for _ in range(2):
        with pytest.raises(Killed):
            prepare([corpus[0]], out, **SETTINGS)
        with pytest.raises(
            DataError, match=r"preparation is unfinished; run the same `hybridtrain data` command again"
        ):
            TokenDataset.open(out)
        if after > 29:
            break
    encoded.clear()
    monkeypatch.setattr(encode, "_encoded", killed_after(10**9))
    prepare([corpus[0]], out, **SETTINGS)
    assert contents(out) == contents(folder)
    if commit_bytes == 1:
        assert len(encoded) == 60 - (2 * after if after <= 29 else after), (
            "committed documents are not encoded again"
        )


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_killed_between_a_shard_and_its_commit(
    folder: Path,
    corpus: tuple[Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    renamed: int,
) -> None:
    monkeypatch.setattr(encode, "_COMMIT_BYTES", 1)
    out = tmp_path / "out"
    real = Path.replace
    calls = 0

    def replace(self: Path, target: Path) -> Path:
        nonlocal calls
        if self.name.startswith("train-00002"):
            calls += 1
            if calls > renamed:
                raise Killed
        elif self.name == "journal.json.part" and calls:
            raise Killed
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(Killed):
        prepare([corpus[0]], out, **SETTINGS)
    assert calls == min(renamed + 1, 2)
    monkeypatch.setattr(Path, "replace", real)
    prepare([corpus[0]], out, **SETTINGS)
    assert "starting over" not in capsys.readouterr().err
    left = contents(out)
    left.pop("journal.json.part", None)
    assert left == contents(folder)


def _prepare_and_die(source: Path, out: Path) -> None:
    encode._COMMIT_BYTES = 2000
    real = encode.write_journal
    left = [12]

    def write(out: Path, state: Any) -> None:
        real(out, state)
        left[0] -= 1
        if left[0] <= 0 and state.train.open_tokens:
            os.kill(os.getpid(), signal.SIGKILL)

    encode.write_journal = write
    prepare([source], out, **SETTINGS)


def test_a_killed_process_is_resumed(
    folder: Path, corpus: tuple[Path, list[str]], tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=_prepare_and_die, args=(corpus[0], out))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    prepare([corpus[0]], out, **SETTINGS)
    said = capsys.readouterr().err
    assert "resuming after" in said
    assert "starting over" not in said
    assert contents(out) == contents(folder)


@pytest.mark.parametrize(
    "change", ["source", "settings", "tokenizer", "compression", "shard", "shorter", "journal"]
)
def test_what_no_longer_fits_is_started_over(
    corpus: tuple[Path, list[str]],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: str,
) -> None:
    source, out, settings = tmp_path / "corpus.jsonl", tmp_path / "out", dict(SETTINGS)
    shutil.copy(corpus[0], source)
    with monkeypatch.context() as patch:
        patch.setattr(encode, "_COMMIT_BYTES", 1)
        patch.setattr(prepare_module, "_finish", lambda *_: (_ for _ in ()).throw(Killed))
        patch.setattr(prepare_module.SplitWriter, "finish", lambda self: None)
        with pytest.raises(Killed):
            prepare([source], out, **settings)
    if change == "source":
        source.write_bytes(source.read_bytes() + b'{"text": "one more"}\n')
    elif change == "settings":
        settings["shard_tokens"] = 1600
    else:
        names = {
            "tokenizer": "tokenizer.json",
            "compression": "compression.npy",
            "shard": "train-00001.tokens",
        }
        opened = [path for path in out.glob("*.tokens.part") if path.stat().st_size]
        path = out / (names | {"journal": "journal.json", "shorter": opened[0].name})[change]
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content[: -4 if change == "shorter" else None])
    capsys.readouterr()
    prepare([source], out, **settings)
    assert "starting over" in capsys.readouterr().err
    if change not in ("source", "settings"):
        assert {k: v for k, v in contents(out).items() if k != "manifest.json"} == {
            k: v for k, v in contents(folder).items() if k != "manifest.json"
        }
    else:
        fresh = tmp_path / "fresh"
        prepare([source], fresh, **settings)
        assert contents(out) == contents(fresh)
