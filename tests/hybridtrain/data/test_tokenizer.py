from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from hybridtrain.data import tokenizer as tokenizer_module
from hybridtrain.data.tokenizer import (
    _for_encoding,
    find_separator,
    for_texts,
    library_errors,
    load_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from hybridtrain.errors import DataError, UserError
from tests.hybridtrain.data import zoo

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "naïve 世界\ttabs\r\nand lines"] * 5


def test_training_is_deterministic_and_lossless() -> None:
    first, second = (train_tokenizer(iter(TEXTS), 280) for _ in range(2))
    assert first.to_str() == second.to_str()
    for text in [*TEXTS, "\x00 never seen: \U0001f600 Ω"]:
        assert first.decode(first.encode(text, add_special_tokens=False).ids) == text
    assert find_separator(first) == ("<|endoftext|>", 0)
    assert vocabulary_size(first) == 280
    assert vocabulary_size(train_tokenizer(["ab"], 300)) < 300


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match=r"vocab_size=256 is too small; .* at least 257"):
        train_tokenizer(TEXTS, 256)
    assert vocabulary_size(train_tokenizer(TEXTS, 257)) == 257


def test_a_separator_spelled_out_in_a_text_stays_text(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    train_tokenizer(TEXTS, 300).save(str(path))
    tokenizer = load_tokenizer(path)
    text = "before <|endoftext|> after"
    ids = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    assert 0 not in ids
    assert tokenizer.decode(ids) == text


def test_loading_turns_truncation_and_padding_off(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.decode(loaded.encode(TEXTS[0], add_special_tokens=False).ids) == TEXTS[0]


FAR = b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 4294967295}, "unk_token": "a"}}'
BAD = [
    (b"{}", "is not a tokenizer.json"),
    (b"\xff", "not UTF-8 at byte 0"),
    (None, "cannot be read"),
    (b'{"a": ' * 5000, "is not a tokenizer.json"),
    (FAR, "has the token id 4,294,967,295; the highest that is taken is"),
]


@pytest.mark.parametrize(("content", "message"), BAD)
def test_bad_files_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"bad.json: .*{message}"):
        load_tokenizer(path)


def test_a_panic_of_the_library_is_a_message() -> None:
    class PanicException(BaseException):
        pass

    with pytest.raises(DataError, match="it: deep inside"), library_errors("it"):
        raise PanicException("deep inside")
    with pytest.raises(KeyboardInterrupt), library_errors("it"):
        raise KeyboardInterrupt


def test_separator_choice(tmp_path: Path, deepseek_tokenizer: Path) -> None:
    deepseek = load_tokenizer(deepseek_tokenizer)
    assert find_separator(deepseek) == ("<｜begin▁of▁sentence｜>", 0)
    assert find_separator(deepseek, "<｜end▁of▁sentence｜>") == ("<｜end▁of▁sentence｜>", 1)
    assert vocabulary_size(deepseek) == 129_280
    with pytest.raises(
        DataError,
        match=r"separator '<eod>' is not a token of the tokenizer; .* it has <｜begin▁of▁sentence｜>",
    ):
        find_separator(deepseek, "<eod>")
    plain = json.loads(train_tokenizer(TEXTS, 300).to_str())
    plain["added_tokens"] = []
    plain["model"]["vocab"]["plain"] = plain["model"]["vocab"].pop("<|endoftext|>")
    (tmp_path / "plain.json").write_text(json.dumps(plain), encoding="utf-8")
    with pytest.raises(DataError, match=r"separator '\\udcff': .* surrogates not allowed"):
        find_separator(deepseek, "\udcff")  # what a command line makes of a byte that is not UTF-8
    with pytest.raises(
        DataError, match=r"none of <\|endoftext\|>, .*; name its separator token with --separator"
    ):
        find_separator(load_tokenizer(tmp_path / "plain.json"))


def without_special(tokenizer: Tokenizer) -> Tokenizer:
    """The same with no token called special."""
    tree = json.loads(tokenizer.to_str())
    for token in tree["added_tokens"]:
        token["special"] = False
    return Tokenizer.from_str(json.dumps(tree))


SEPARATORS = {
    "special": {"special": True, "normalized": False},
    "not special": {"special": False},
    "not special, as it is": {"special": False, "normalized": False},
    "takes the space before it": {"special": False, "lstrip": True},
    "takes the space behind it": {"special": False, "rstrip": True, "normalized": True},
    "a word": {"special": False, "single_word": True},
}


@pytest.mark.parametrize("flags", SEPARATORS.values(), ids=SEPARATORS)
@pytest.mark.parametrize("make", [zoo.byte_level, zoo.llama2], ids=["byte-level", "llama 2"])
def test_no_text_has_the_separator(make: Callable[..., Tokenizer], flags: dict[str, bool]) -> None:
    tokenizer = make(added=[AddedToken("<|doc|>", **flags), AddedToken("<|user|>", special=True)])
    names = {name: tokenizer.token_to_id(name) for name in ("<|doc|>", "<|user|>")}
    plain = for_texts(_for_encoding(tokenizer), "<|doc|>")
    for text in ("<|doc|>", "a <|doc|> b", "x<|doc|>y<|user|>", " <|doc|><|doc|> ", "<|DOC|>"):
        ids = plain.encode(text, add_special_tokens=False).ids
        assert not set(names.values()) & set(ids)
        if make is zoo.byte_level:
            assert "".join(plain.id_to_token(i) for i in ids).replace("Ġ", " ") == text
    assert {name: plain.token_to_id(name) for name in names} == names


@pytest.mark.parametrize("kind", ["unigram", "words", "metaspace never", "bert", "gpt-4"])
def test_an_entry_of_the_vocabulary_may_be_the_separator(kind: str) -> None:
    """ "</s>" stands in the model's own vocabulary, where Unigram and words would find it in a text."""
    tokenizer = _for_encoding(without_special(zoo.tokenizer(kind)))
    token_id = tokenizer.token_to_id("</s>")
    before = tokenizer.encode("hello world", add_special_tokens=False).ids
    plain = for_texts(tokenizer, "</s>")
    for text in ("</s>", "a </s> b", "a</s>b", "</s></s>"):
        assert token_id not in plain.encode(text, add_special_tokens=False).ids
    assert plain.encode("hello world", add_special_tokens=False).ids == before
    tree = json.loads(tokenizer.to_str())
    tree["added_tokens"] = []
    bare = _for_encoding(Tokenizer.from_str(json.dumps(tree)))
    assert token_id not in for_texts(bare, "</s>").encode("a </s> b", add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("kind", "separator"),
    [("gpt-4", "e"), ("metaspace never", "l"), ("words", "<unk>"), ("unigram", "<unk>")],
)
def test_a_separator_that_texts_consist_of_is_refused(kind: str, separator: str) -> None:
    with pytest.raises(DataError, match=rf"separator '{separator}' is a token that texts are encoded with"):
        for_texts(_for_encoding(without_special(zoo.tokenizer(kind))), separator)


@pytest.mark.parametrize("kind", ["unigram", "words", "llama 2"])
def test_other_special_tokens_are_text_too(kind: str) -> None:
    tokenizer = _for_encoding(Tokenizer.from_str(zoo.tokenizer(kind).to_str()))
    ids = for_texts(tokenizer, "</s>").encode("hello <s> world </s>", add_special_tokens=False).ids
    assert not {tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")} & set(ids)
    assert tokenizer.token_to_id("<s>") is not None


def test_a_tokenizer_encodes_without_dropout(tmp_path: Path) -> None:
    tokenizer = zoo.byte_level()
    want = tokenizer.encode(zoo.TEXTS[0]).ids
    tokenizer.model.dropout = 0.5
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json").encode(zoo.TEXTS[0]).ids == want


def test_an_odd_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = json.loads(zoo.tokenizer("words").to_str())
    path = tmp_path / "tokenizer.json"
    for change, message in (
        (
            {"model": good["model"] | {"vocab": {"a": 1 << 30, "<unk>": 0}}},
            r"has the token id 1,073,741,824; the highest that is taken",
        ),
        ({"model": good["model"] | {"vocab": {}}, "added_tokens": []}, "has no tokens"),
        ({"model": []}, "is not a tokenizer.json that the tokenizers library can load"),
    ):
        path.write_text(json.dumps(good | change), encoding="utf-8")
        with pytest.raises(DataError, match=message):
            load_tokenizer(path)
    path.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(DataError, match=r"is not a tokenizer.json"):
        load_tokenizer(path)
    monkeypatch.setattr(tokenizer_module, "MAX_TOKENIZER_BYTES", 1000)
    with pytest.raises(UserError, match="is longer than 1,000 bytes"):
        load_tokenizer(path)
