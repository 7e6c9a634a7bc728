from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hybridtrain.data.compress import read_compression
from hybridtrain.data.shards import Split, TokenDataset
from hybridtrain.errors import DataError, UserError
from hybridtrain.files.durable import file_digest


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A data folder of the test's own."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def whole(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and starts of a split, read from the raw files."""
    tokens, starts = [], []
    for path in sorted(folder.glob(f"{split}-*.tokens")):
        tokens.append(np.fromfile(path, "<u2"))
        starts.append(np.zeros(len(tokens[-1]), bool))
        starts[-1][np.fromfile(path.with_suffix(".starts"), "<i8")] = True
    return np.concatenate(tokens), np.concatenate(starts)


@pytest.mark.parametrize("name", ["train", "validation"])
def test_windows_of_any_place_and_length(folder: Path, name: str) -> None:
    split = TokenDataset.open(folder, verify=True).split(name)  # type: ignore[arg-type]
    tokens, starts = whole(folder, name)
    assert split.num_tokens == len(tokens)
    assert split.num_documents == starts.sum()
    assert (tokens[starts] == split.separator_id).all()
    assert starts[0]
    ends = np.cumsum([path.stat().st_size // 2 for path in sorted(folder.glob(f"{name}-*.tokens"))])
    assert len(ends) > 1
    borders = {int(end) + shift for end in ends for shift in (-1, 0, 1)}
    for length in (0, 1, 7, 499, 5000, len(tokens)):
        for start in {
            place
            for place in (*borders, 0, 1, 333, len(tokens) - length)
            if 0 <= place <= len(tokens) - length
        }:
            got_tokens, got_starts = split.window(start, length)
            assert got_tokens.dtype == np.int64
            assert got_starts.dtype == np.bool_
            np.testing.assert_array_equal(got_tokens, tokens[start : start + length])
            np.testing.assert_array_equal(got_starts, starts[start : start + length])
    for start, length in ((-1, 5), (0, len(tokens) + 1), (len(tokens), 1)):
        with pytest.raises(IndexError, match="leaves the"):
            split.window(start, length)


def test_opened_data_says_what_it_is(folder: Path) -> None:
    dataset = TokenDataset.open(folder)
    assert dataset.tokenizer_path == folder / "tokenizer.json"
    assert dataset.compression.shape == (dataset.manifest.vocab_size,) == (320,)
    assert dataset.compression.max() + 1 == dataset.manifest.compressed_size
    train, validation = dataset.split("train"), dataset.split("validation")
    assert isinstance(train, Split)
    assert (train.num_bytes, validation.num_bytes) == (
        dataset.manifest.train.bytes,
        dataset.manifest.validation.bytes,
    )


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_all_problems_of_a_folder_are_listed_at_once(copy: Path) -> None:
    (copy / "train-00000.tokens").unlink()
    cut = copy / "train-00001.starts"
    size = cut.stat().st_size
    cut.write_bytes(cut.read_bytes()[:-8])
    flip_last_byte(copy / "train-00002.tokens")
    flip_last_byte(copy / "validation-00000.starts")
    flip_last_byte(copy / "tokenizer.json")
    flip_last_byte(copy / "compression.npy")
    with pytest.raises(DataError) as caught:
        TokenDataset.open(copy, verify=True)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{copy}: 6 problem(s)"
    for line, part in zip(
        lines[1:],
        (
            "  tokenizer.json: is not the one this data was made with (xxh3 ",
            "  compression.npy: is not the one this data was made with (xxh3 ",
            "  train-00000.tokens: is missing",
            f"  train-00001.starts: has {size - 8} bytes instead of {size}",
            "  train-00002.tokens: is damaged (xxh3 ",
            "  validation-00000.starts: is damaged (xxh3 ",
        ),
        strict=True,
    ):
        assert line.startswith(part)
    with pytest.raises(DataError, match=r"4 problem\(s\)"):
        TokenDataset.open(copy, verify=False)


def test_checksums_are_compared_only_on_request(copy: Path) -> None:
    flip_last_byte(copy / "train-00002.tokens")
    TokenDataset.open(copy, verify=False)
    with pytest.raises(DataError, match=r"train-00002.tokens: is damaged"):
        TokenDataset.open(copy, verify=True)


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def run(path: Path) -> None:
        tree = json.loads(path.read_text(encoding="utf-8"))
        change(tree)
        path.write_text(json.dumps(tree), encoding="utf-8")

    return run


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"has no manifest.json; make the data with `hybridtrain data"),
        (
            lambda path: path.rename(path.with_name("journal.json")),
            r"preparation is unfinished; run the same `hybridtrain data`",
        ),
        (lambda path: path.write_text("{"), r"manifest.json: cannot be read"),
        (lambda path: path.write_bytes(b"\xff"), r"manifest.json: cannot be read"),
        (edit(lambda tree: tree.update(format=99)), r"has format 99, this version reads format 1"),
        (edit(lambda tree: tree.pop("dtype")), r"is damaged: dtype: Field required"),
        (
            edit(lambda tree: tree["train"]["shards"][0].update(tokens="x")),
            r"is damaged: train.shards.0.tokens: ",
        ),
        (
            edit(lambda tree: tree["train"]["shards"][0].update(name="../train-00000")),
            r"train.shards.0.name: String should match pattern",
        ),
        (
            edit(lambda tree: tree["train"]["shards"][0].update(name="validation-00000")),
            r"validation-00000 is not a shard of train",
        ),
        (
            edit(lambda tree: tree["train"]["shards"].append(tree["train"]["shards"][0])),
            r"train: .*its shards have \d+ tokens, not ",
        ),
        (
            edit(lambda tree: tree["train"].update(tokens=-5)),
            r"train.tokens: Input should be greater than or equal to 0",
        ),
        (
            edit(lambda tree: tree["validation"].update(bytes=1.5)),
            r"validation.bytes: Input should be a valid integer",
        ),
        (edit(lambda tree: tree.update(separator_id=320)), r"separator_id=320 is not one of the 320 tokens"),
        (edit(lambda tree: tree.update(vocab_size=70_000)), r"dtype=uint16 holds no 70000 tokens"),
        (
            lambda path: path.write_text("[" * 100_000),
            r"manifest.json: cannot be read: is nested deeper than",
        ),
        (lambda path: path.write_text('{"format": 1, "format": 1}'), r"the key 'format' stands twice"),
        (
            edit(lambda tree: tree.update(vocab_size=321)),
            r"compression.npy: is int64 \[320\], not int64 \[321\]",
        ),
    ],
)
def test_bad_manifests_are_refused(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy / "manifest.json")
    with pytest.raises(DataError, match=message):
        TokenDataset.open(copy, verify=True)


def reseal(folder: Path, name: str, content: bytes) -> None:
    """Change a file of a shard, and the manifest with it, as somebody would who means harm."""
    (folder / name).write_bytes(content)
    shard, suffix = name.split(".")
    digest = file_digest(folder / name)
    edit(
        lambda tree: next(s for s in tree["train"]["shards"] if s["name"] == shard).update(
            {f"{suffix}_xxh3": digest}
        )
    )(folder / "manifest.json")


def test_starts_that_leave_their_shard_are_refused(copy: Path) -> None:
    starts = np.fromfile(copy / "train-00001.starts", "<i8")
    for wrong in (starts[::-1], starts - starts[0] - 1, starts + 10**6):
        reseal(copy, "train-00001.starts", wrong.astype("<i8").tobytes())
        with pytest.raises(
            DataError, match=r"train-00001.starts: is not a rising list of places in [\d,]+ tokens"
        ):
            TokenDataset.open(copy, verify=True)


def test_tokens_that_are_none_are_refused_where_they_are_read(copy: Path) -> None:
    tokens = np.fromfile(copy / "train-00000.tokens", "<u2")
    tokens[5] = 320  # of 320
    reseal(copy, "train-00000.tokens", tokens.tobytes())
    split = TokenDataset.open(copy, verify=True).split("train")
    split.window(6, 100)
    with pytest.raises(
        DataError, match=r"train has tokens that its tokenizer has not, or no separator at a start"
    ):
        split.window(0, 100)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no array", "is not an array of numpy"),
        (pickle.dumps([1]), "is not an array of numpy"),
        (
            np.arange(320).astype(np.float64),
            r"says float64 \[320\] of 2560 bytes; it must be int64 \[tokens\]",
        ),
        (np.arange(320) - 1, "holds -1 to 318, of 320 tokens"),
        (np.arange(320) + 1, "holds 1 to 320, of 320 tokens"),
        (np.zeros(10**5, np.int64), "is of 100000 tokens, the model of 320"),
    ],
    ids=["text", "pickle", "floats", "negative", "high", "long"],
)
def test_bad_compression_maps_are_refused(tmp_path: Path, content: bytes | np.ndarray, message: str) -> None:
    path = tmp_path / "compression.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(UserError, match=f"compression.npy: {message}"):
        read_compression(path, 320)


def test_a_missing_folder_tells_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"nowhere: no such data folder; make it with `hybridtrain data SOURCE --out .*nowhere`",
    ):
        TokenDataset.open(tmp_path / "nowhere", verify=True)


def test_what_is_no_file_is_named(copy: Path) -> None:
    for name in ("tokenizer.json", "compression.npy"):
        (copy / name).unlink()
    (copy / "tokenizer.json").mkdir()
    os.mkfifo(copy / "compression.npy")
    with pytest.raises(DataError) as caught:
        TokenDataset.open(copy)
    assert "tokenizer.json: cannot be read: Is a directory" in str(caught.value)
    assert "compression.npy: cannot be read: is not a regular file" in str(caught.value)


@pytest.mark.parametrize("harm", ["unlink", "cut"])
def test_a_shard_that_goes_away_while_it_is_read_is_named(copy: Path, harm: str) -> None:
    split = TokenDataset.open(copy).split("train")
    split.window(0, 10)
    path = copy / "train-00000.tokens"
    if harm == "unlink":
        path.unlink()
    else:
        os.truncate(path, 2)
    message = "is missing" if harm == "unlink" else r"has 2 bytes instead of [\d,]+"
    with pytest.raises(DataError, match=rf"{copy}: {path.name}: {message}; it was whole when the run began"):
        split.window(0, 10)
