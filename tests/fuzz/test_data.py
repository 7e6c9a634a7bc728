"""Texts, compressed streams, tokenizers and data folders that somebody else made, or that were damaged on the
way.
"""

from __future__ import annotations

import bz2
import copy
import gzip
import json
import lzma
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from hybridtrain.data import cuts as cuts_module
from hybridtrain.data import encode
from hybridtrain.data.compress import compression_map
from hybridtrain.data.cuts import Cuts
from hybridtrain.data.documents import read_pieces
from hybridtrain.data.prepare import prepare
from hybridtrain.data.shards import TokenDataset
from hybridtrain.data.sources import list_files
from hybridtrain.data.tokenizer import find_separator, for_texts, library_errors, load_tokenizer
from tests.fuzz.harness import examples, outcome
from tests.hybridtrain.data import zoo

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lambda content: lzma.compress(content, preset=0),
    ".bz2": bz2.compress,
}
DRAW = st.randoms(use_true_random=False)
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    1 << 40,
    1 << 70,
    "",
    "x",
    "../../x",
    "\ud800",
    [],
    {},
    [[]],
    {"type": "BPE"},
    [1, 2],
]
LINES = st.one_of(
    st.builds(lambda text: json.dumps({"text": text}).encode(), st.text(min_size=1)),
    st.builds(
        lambda text: json.dumps({"text": text}, ensure_ascii=False).encode("utf-8", "surrogatepass"),
        st.text(),
    ),
    st.sampled_from(
        [
            b"",
            b" \t",
            b"\r",
            b'{"text": "a", "text": "b"}',
            b'{"text": 3}',
            b"[]",
            b"[" * 3000,
            b"\xef\xbb\xbf",
            b"nul",
        ]
    ),
    st.binary(max_size=20),
)


def read_all(path: Path) -> list[str]:
    """The whole documents of one file."""
    texts: list[str] = []
    for piece in read_pieces(list_files([path]).corpus[0]):
        if piece.first:
            texts.append("")
        texts[-1] += piece.text
    return texts


@examples(30)
@given(lines=st.lists(LINES, max_size=6), suffix=st.sampled_from(list(PACK)))
def test_lines_are_all_documents_or_refused(tmp_path: Path, lines: list[bytes], suffix: str) -> None:
    content = b"\n".join(lines)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACK[suffix](content))
    texts = outcome(lambda: read_all(path))
    if texts is not None:
        found = [line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
        assert texts == [json.loads(line)["text"] for line in found]


@examples(30)
@given(draw=DRAW, suffix=st.sampled_from([".gz", ".xz", ".bz2"]), kind=st.sampled_from([".txt", ".jsonl"]))
def test_a_damaged_stream_gives_its_whole_text_or_none(
    tmp_path: Path, draw: Any, suffix: str, kind: str
) -> None:
    texts = ["one text " * 30, "and another"]
    whole = (
        "".join(json.dumps({"text": text}) + "\n" for text in texts) if kind == ".jsonl" else "".join(texts)
    )
    parts = [PACK[suffix](part.encode()) for part in (whole[:100], whole[100:])]
    path = tmp_path / f"a{kind}{suffix}"
    path.write_bytes(damaged(b"".join(parts), draw))
    if path.read_bytes() == parts[0]:  # cut between two streams, which nobody can see
        return
    got = outcome(lambda: read_all(path))
    assert got is None or got == (texts if kind == ".jsonl" else [whole])


@examples(25)
@given(
    draw=DRAW,
    kind=st.sampled_from(["byte-level", "gpt-4", "llama 2", "bert", "unigram", "words", "metaspace first"]),
)
def test_an_odd_tokenizer_encodes_or_is_refused(tmp_path: Path, draw: Any, kind: str) -> None:
    tree = mutated(json.loads(zoo.tokenizer(kind).to_str()), draw)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tree), encoding="utf-8")

    def use() -> None:
        tokenizer = load_tokenizer(path)
        separator, separator_id = find_separator(tokenizer, draw.choice([None, "<s>", "e"]))
        compression_map(tokenizer)
        texts = for_texts(tokenizer, separator)
        text = "hello </s> wörld 世界 <s>" * 20
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuts_module, "_PROBES", 40)
            parts = list(Cuts(texts, limit=100).parts([text], "a text"))
        with library_errors("it fails on a text"):
            ids = [i for part in parts for i in texts.encode(part.text, add_special_tokens=False).ids]
        assert separator_id not in ids or texts.token_to_id(separator) is None or unknown(texts) == separator

    outcome(use)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    """A data folder with several shards in both splits, its training tokens and where its documents start."""
    source = tmp_path_factory.mktemp("fuzz") / "a.jsonl"
    source.write_text(
        "".join(json.dumps({"text": f"document {n} " * 9}) + "\n" for n in range(40)), encoding="utf-8"
    )
    out = source.parent / "out"
    prepare([source], out, vocab_size=270, validation_fraction=0.3, shard_tokens=700, progress=False)
    return out, *everything(out, True)


def everything(folder: Path, verify: bool) -> tuple[np.ndarray, np.ndarray]:
    split = TokenDataset.open(folder, verify=verify).split("train")
    return split.window(0, split.num_tokens)


@examples(35)
@given(draw=DRAW)
def test_a_manifest_describes_the_whole_data_or_is_refused(tmp_path: Path, made: Any, draw: Any) -> None:
    folder = tmp_path / "copy"
    if not folder.exists():
        shutil.copytree(made[0], folder)
    (folder / "manifest.json").write_text(
        json.dumps(mutated(json.loads((made[0] / "manifest.json").read_text()), draw))
    )
    got = outcome(lambda: everything(folder, True))
    if got is not None:
        np.testing.assert_array_equal(got[0], made[1])
        np.testing.assert_array_equal(got[1], made[2])


@examples(30)
@given(draw=DRAW, verify=st.booleans())
def test_damaged_files_of_a_folder_are_refused(tmp_path: Path, made: Any, draw: Any, verify: bool) -> None:
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made[0], folder)
    path = draw.choice(
        sorted(
            p for p in folder.iterdir() if p.name != ".lock" and p.name.startswith(("train", "comp", "tok"))
        )
    )
    content = path.read_bytes()
    path.write_bytes(damaged(content, draw))
    got = outcome(lambda: everything(folder, verify))
    if verify:
        assert (got is None) == (path.read_bytes() != content)


@examples(6)
@given(draw=DRAW)
def test_a_damaged_journal_ends_in_the_same_data(tmp_path: Path, made: Any, draw: Any) -> None:
    source, out = made[0].parent / "a.jsonl", tmp_path / "out"
    arguments = {"vocab_size": 270, "validation_fraction": 0.3, "shard_tokens": 700, "progress": False}
    shutil.rmtree(out, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "_COMMIT_BYTES", 1000)
        patch.setattr(
            encode.EncodingProgress, "finish_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            prepare([source], out, **arguments)
    tree = json.loads((out / "journal.json").read_text())
    (out / "journal.json").write_text(json.dumps(mutated(tree, draw)))
    if outcome(lambda: prepare([source], out, **arguments)) is not None:
        np.testing.assert_array_equal(everything(out, True)[0], made[1])


def damaged(content: bytes, draw: Any) -> bytes:
    """The bytes cut, with some turned over, with some doubled, or with others behind them."""
    place = draw.randrange(len(content))
    turned = bytearray(content)
    turned[place] ^= 1 << draw.randrange(8)
    return bytes(
        draw.choice(
            [
                content[:place],
                bytes(turned),
                content[:place] + content[place // 2 :],
                content + draw.randbytes(9),
            ]
        )
    )


def mutated(tree: Any, draw: Any) -> Any:
    """The tree with one of its values replaced by an odd one, left out, or doubled."""
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    shallow = [place for place in places if place[2] < 4]
    parent, key, _ = draw.choice(draw.choice([places, shallow]))
    act = draw.randrange(4)
    if act == 0:
        del parent[key]
    elif act == 1 and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]))
    elif act == 2 and isinstance(parent[key], int):
        parent[key] += draw.choice([-1, 1, 1 << 16, 1 << 31])
    else:
        parent[key] = copy.deepcopy(draw.choice(ODD))
    return tree


def _places(tree: Any, depth: int = 0) -> Iterator[tuple[Any, Any, int]]:
    """Every value below a tree: its parent, its key or number there, its depth."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key, depth
        yield from _places(value, depth + 1)


def unknown(tokenizer: Tokenizer) -> Any:
    """The token of a model that stands for what it does not know."""
    model = json.loads(tokenizer.to_str())["model"]
    return model.get("unk_token")
