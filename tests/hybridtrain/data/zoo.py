"""Small tokenizers of every kind that published models have, and some that allow no cut."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "hello world this is a test of words, it's fine. " * 5,
    "世界日本語 と 한국어 naïve über 1234 5678\n\n" * 5,
    "don't stop, it's WORDS and camelCase  " * 3,
]
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<unk>", "<s>", "</s>"]
Added = Sequence[AddedToken]


def _trained(model: Any, trainer: Any, normalizer: Any, words: Any, added: Added = ()) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if words is not None:
        tokenizer.pre_tokenizer = words
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens(list(added))
    return tokenizer


def bpe(normalizer: Any, words: Any, added: Added = (), **options: Any) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    return _trained(models.BPE(unk_token="<unk>", **options), trainer, normalizer, words, added)


def byte_level(pattern: str | None = None, prefix: bool = False, added: Added = ()) -> Tokenizer:
    words: Any = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=pattern is None)
    if pattern is not None:
        words = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), words])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    return _trained(models.BPE(), trainer, None, words, added)


def llama2(added: Added = ()) -> Tokenizer:
    """As Llama 2: the text is one word, "▁" stands first, unknown characters are bytes, no entry has "▁"
    behind something else.
    """
    tree = json.loads(bpe(None, pre_tokenizers.Metaspace(prepend_scheme="always")).to_str())
    vocab = tree["model"]["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    tree["model"] |= {"byte_fallback": True, "fuse_unk": True}
    tree["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(tree))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_tokens(list(added))
    return tokenizer


def wordpiece() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    words = pre_tokenizers.BertPreTokenizer()
    return _trained(models.WordPiece(unk_token="<unk>"), trainer, normalizers.BertNormalizer(), words)


def unigram(normalizer: Any = None, added: Added = ()) -> Tokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=200, unk_token="<unk>", special_tokens=SPECIAL, show_progress=False
    )
    return _trained(models.Unigram(), trainer, normalizer, pre_tokenizers.Metaspace(), added)


def word_level() -> Tokenizer:
    trainer = trainers.WordLevelTrainer(vocab_size=100, special_tokens=SPECIAL, show_progress=False)
    return _trained(models.WordLevel(unk_token="<unk>"), trainer, None, pre_tokenizers.WhitespaceSplit())


def metaspace(scheme: str, split: bool = True) -> Tokenizer:
    return bpe(None, pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split))


ODD = (
    AddedToken("hello wor", normalized=False),
    AddedToken("  ", normalized=True),
    AddedToken("<tool>", lstrip=True, rstrip=True),
    AddedToken("stop", single_word=True),
)
MAKE: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "byte-level, space first": partial(byte_level, prefix=True),
    "byte-level, odd added tokens": partial(byte_level, added=ODD),
    "gpt-4": partial(byte_level, GPT4),
    "llama 2": llama2,
    "llama 2, odd added tokens": partial(llama2, ODD),
    "metaspace always": partial(metaspace, "always"),
    "metaspace first": partial(metaspace, "first"),
    "metaspace never": partial(metaspace, "never"),
    "metaspace first, one word": partial(metaspace, "first", split=False),
    "bert": wordpiece,
    "unigram": unigram,
    "unigram, nfkc": partial(unigram, normalizers.NFKC()),
    "words": word_level,
    "nfc, digits": lambda: bpe(
        normalizers.NFC(), pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    ),
    "nfd, stripped, punctuation": lambda: bpe(
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Strip()]),
        pre_tokenizers.Punctuation(),
    ),
    "white space squeezed": lambda: bpe(normalizers.Replace(Regex(r"\s+"), " "), pre_tokenizers.Metaspace()),
    "scripts": lambda: bpe(None, pre_tokenizers.UnicodeScripts()),
}


def _then_words(pattern: str) -> Tokenizer:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return bpe(None, pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)]))


UNCUTTABLE: dict[str, Callable[[], Tokenizer]] = {
    "words in pairs": partial(byte_level, r"\S+\s+\S+"),
    "quotations": partial(byte_level, r'"[^"]*"|\S+|\s+'),
    "five characters": lambda: bpe(None, pre_tokenizers.FixedLength(5)),
    "quotations by a class": partial(byte_level, r'"[\s\S]*?"|\S+|\s+'),
    "two characters": partial(_then_words, r"(?m:.{2})"),
    "three of a class": partial(_then_words, r"[\w\W]{3}"),
    "half a thousand": partial(byte_level, r".{1,500}\s"),
    "unigram of one word": lambda: _one_word(unigram()),
    "comments removed": lambda: bpe(
        normalizers.Replace(Regex(r"/\*[\s\S]*?\*/"), ""), pre_tokenizers.WhitespaceSplit()
    ),
}


def _one_word(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    return tokenizer


@cache
def tokenizer(kind: str) -> Tokenizer:
    return (MAKE | UNCUTTABLE)[kind]()
