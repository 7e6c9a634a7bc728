from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models

from hybridtrain.data.compress import compression_map
from hybridtrain.data.tokenizer import load_tokenizer, train_tokenizer


def word_tokenizer(words: list[str]) -> Tokenizer:
    """Decodes id n to words[n], unchanged."""
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def test_deepseek_shrinks_to_the_published_size(deepseek_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(deepseek_tokenizer)
    compressed = compression_map(tokenizer)
    assert compressed.dtype == np.int64
    assert compressed.shape == (129_280,)
    assert len(np.unique(compressed)) == compressed.max() + 1 == 99_092

    def same(*words: str) -> bool:
        ids = [tokenizer.encode(word, add_special_tokens=False).ids for word in words]
        assert all(len(i) == 1 for i in ids), "the words must be single tokens"
        return len({int(compressed[i[0]]) for i in ids}) == 1

    assert same("Apple", " apple", " Apple")
    assert same(" ", "\n", "  ")
    assert not same(" apple", " orange")


def test_keys_follow_the_definition() -> None:
    words = ["Café", " cafe", "CAFÉ ", "ﬁ", "fi", " ", "\t\n", "a \t b", "A B", "\u0301", "\u0301x", "\u0302", "x", "٣", "３", "3"]
    compressed = compression_map(word_tokenizer(words))
    assert compressed.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 5, 7, 8, 8]


def test_ids_count_first_occurrences_and_parts_of_characters_stay_apart() -> None:
    tokenizer = train_tokenizer(["hello world"], 300)
    compressed = compression_map(tokenizer)
    first_seen = list(dict.fromkeys(compressed.tolist()))
    assert first_seen == list(range(len(first_seen)))
    lone_bytes = [i for i in range(len(compressed)) if "\ufffd" in tokenizer.decode([i], skip_special_tokens=False)]
    assert len(lone_bytes) == 128  # 0x80 .. 0xff
    assert len(set(compressed[lone_bytes].tolist())) == 128


def test_added_tokens_are_in_the_map_under_their_own_keys() -> None:
    tokenizer = word_tokenizer(["a", "b"])
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens(["A"])
    assert compression_map(tokenizer).tolist() == [0, 1, 2, 0]
