from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from hybridtrain.data import cuts as cuts_module
from hybridtrain.data import encode
from hybridtrain.data.cuts import Cuts, Part
from hybridtrain.data.prepare import prepare
from hybridtrain.data.shards import TokenDataset
from hybridtrain.errors import DataError
from tests.hybridtrain.data import zoo

CHARS = "abcXYZ   \n\n\t0123.,'-_(\"世界。，éßж한กे\u0301\u0308e😀½ﬁ"
STRINGS = [
    "hello world",
    " world",
    " the",
    "   ",
    "x" * 80,
    "<s>",
    "</s>",
    "don't stop",
    "/* no */",
    '"',
    "日本語" * 20,
    "<tool>",
]


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def ids_of_part(tokenizer: Tokenizer, part: Part) -> list[int]:
    """As encode_files does it: what is encoded before is taken off."""
    known, both = ids_of(tokenizer, part.context), ids_of(tokenizer, part.context + part.text)
    assert both[: len(known)] == known
    return both[len(known) :]


def text_of(draw: random.Random, length: int) -> str:
    parts = [draw.choice(STRINGS) if draw.random() < 0.2 else draw.choice(CHARS) for _ in range(length)]
    return "".join(parts)


@cache
def small_cuts(kind: str) -> Cuts:
    return Cuts(zoo.tokenizer(kind), kind, limit=40)


@pytest.mark.parametrize("kind", [*zoo.MAKE, *zoo.UNCUTTABLE])
def test_the_parts_have_the_ids_of_the_whole_text(kind: str) -> None:
    draw, tokenizer, cuts = random.Random(kind), zoo.tokenizer(kind), small_cuts(kind)
    numbers = []
    for size in (7, 300):
        text = text_of(draw, 300)
        parts = list(cuts.parts((text[i : i + size] for i in range(0, len(text), size)), "a text"))
        assert parts == list(cuts.parts([text], "a text"))  # however it comes in chunks
        assert "".join(part.text for part in parts) == text
        assert [i for part in parts for i in ids_of_part(tokenizer, part)] == ids_of(tokenizer, text)
        numbers.append(len(parts))
    assert max(numbers) > 1 if kind in zoo.MAKE else numbers == [1, 1]


def test_a_tokenizer_without_cuts_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    cuts = Cuts(zoo.tokenizer("words in pairs"), "pairs", limit=10)
    for _ in range(2):
        assert len(list(cuts.parts(["so many words " * 50], "a.txt"))) == 1
    assert (
        capsys.readouterr().err.count(
            "pairs allows no cut of which its ids are sure: long documents are encoded whole"
        )
        == 1
    )


def test_what_cannot_be_cut_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuts_module, "MAX_UNCUT_CHARS", 2000)
    for kind in ("byte-level", "quotations"):
        assert len(list(small_cuts(kind).parts(["x" * 1900], "a.txt"))) == 1
        with pytest.raises(
            DataError, match=r"a.txt: has more than 2,000 characters in which .* allows no cut"
        ):
            list(small_cuts(kind).parts(("x" * 100 for _ in range(1000)), "a.txt"))


@pytest.mark.parametrize("kind", ["llama 2", "metaspace first", "byte-level, space first", "words in pairs"])
def test_long_documents_are_prepared_with_the_ids_of_the_whole(
    kind: str, tmp_path: Path, monkeypatch: Any
) -> None:
    draw, tokenizer = random.Random(kind), zoo.tokenizer(kind)
    texts = [" ".join(draw.choices(zoo.TEXTS[0].split(), k=30_000)), "x" * 70_000 + " and words", "short"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(encode, "_COMMIT_BYTES", 1)
    real, left = encode.write_journal, [3]

    def stop(*args: Any) -> None:
        real(*args)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(
        encode, "write_journal", stop
    )  # it is stopped inside of a document, and goes on there
    given: dict[str, Any] = {
        "tokenizer": tmp_path / "tokenizer.json",
        "validation_fraction": 0.0,
        "progress": False,
    }
    sources = [tmp_path / f"{number}.txt" for number in range(3)]
    with pytest.raises(KeyboardInterrupt):
        prepare(sources, tmp_path / "out", separator="<s>", **given)
    prepare(sources, tmp_path / "out", separator="<s>", **given)
    split = TokenDataset.open(tmp_path / "out").split("train")
    ids, starts = split.window(0, split.num_tokens)
    documents = np.split(ids, np.flatnonzero(starts))[1:]
    assert [document[1:].tolist() for document in documents] == [ids_of(tokenizer, text) for text in texts]
