from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from hybridtrain.data.compress import compression_map, read_compression, to_npy
from hybridtrain.data.tokenizer import load_tokenizer, train_tokenizer
from hybridtrain.errors import DataError


def npy(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header.encode() + b"\n" + data


HEADER = "{{'descr': '{}', 'fortran_order': False, 'shape': {}, }}"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (npy(HEADER.format("<i8", (2**50,))), r"says int64 \[1125899906842624\] of 0 bytes"),
        (npy(HEADER.format("|O", (1,)), b"\x80\x04N."), r"says object \[1\]"),
        (npy(HEADER.format("<i4", (2,)), bytes(8)), r"says int32 \[2\] of 8 bytes; it must be int64"),
        (npy(HEADER.format("<i8", (1, 1)), bytes(8)), r"says int64 \[1, 1\]"),
        (npy(HEADER.format("<i8", (2,)), b"\xff" * 16), "holds -1 to -1, of 2 tokens"),
        (npy(HEADER.format("<i8", (1,)), b"\x05" + bytes(7)), "holds 5 to 5, of 1 tokens"),
        (npy("(" * 9000), "is not an array of numpy"),
        (npy("__import__('os').system('ls')"), "is not an array of numpy"),
        (b"\x80\x04N.", "is not an array of numpy"),
        (b"", "is not an array of numpy"),
        (to_npy(np.arange(11)), "is of 11 tokens, the model of 10"),
    ],
)
def test_a_map_that_is_none_is_refused(content: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "compression.npy"
    path.write_bytes(to_npy(np.arange(10)))
    assert read_compression(path, 10).tolist() == list(range(10))
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"compression\.npy: {why}"):
        read_compression(path, 10)


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
    words = [
        "Café",
        " cafe",
        "CAFÉ ",
        "ﬁ",
        "fi",
        " ",
        "\t\n",
        "a \t b",
        "A B",
        "\u0301",
        "\u0301x",
        "\u0302",
        "x",
        "٣",
        "３",
        "3",
    ]
    compressed = compression_map(word_tokenizer(words))
    assert compressed.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 5, 7, 8, 8]


def test_ids_count_first_occurrences_and_parts_of_characters_stay_apart() -> None:
    tokenizer = train_tokenizer(["hello world"], 300)
    compressed = compression_map(tokenizer)
    first_seen = list(dict.fromkeys(compressed.tolist()))
    assert first_seen == list(range(len(first_seen)))
    lone_bytes = [
        i for i in range(len(compressed)) if "\ufffd" in tokenizer.decode([i], skip_special_tokens=False)
    ]
    assert len(lone_bytes) == 128  # 0x80 .. 0xff
    assert len(set(compressed[lone_bytes].tolist())) == 128


def test_added_tokens_are_in_the_map_under_their_own_keys() -> None:
    tokenizer = word_tokenizer(["a", "b"])
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens(["A"])
    assert compression_map(tokenizer).tolist() == [0, 1, 2, 0]
