"""Where a long text may be cut so that its parts have the token ids of the whole text.

A tokenizer encodes each word of its pre-tokenizer by itself, so a text may be cut between two words. Whether
two neighbouring characters always lie in two words is found by trial: words are cut by kinds of characters,
and random texts show which pairs of kinds never lie in one word. A BPE without a pre-tokenizer never joins
characters that no entry of its vocabulary has side by side. Each cut is tried out with the text around it
before it is taken.

Changes that a tokenizer makes only at the start of a text (such as a space in front) must not happen at a
cut: a part is encoded behind the last characters before it, its `context`, whose ids are then taken off.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from tokenizers import Encoding, Tokenizer

from hybridtrain.console import say
from hybridtrain.errors import DataError

PART_CHARS = 1 << 16
MAX_UNCUT_CHARS = 1 << 24  # encoding these takes 2.4 GB
CONTEXT_CHARS = 64
_AROUND = 256  # characters on each side of a cut with which it is tried out
_TRIES = 32  # cuts in a row that may fail before the next part of the text is looked at
_PROBES, _PROBE_UNITS = 400, 48
_WHITE = re.compile(
    r"(\\s| |\[[ \\stnr]+\])([*+]|\{\d*,?\d*\})"
)  # runs of white space in a regular expression
# what may match without bound words and the white space between them, e.g. from a quotation mark to the next
_FAR = re.compile(
    r"(\[\^(?!(?:\\.|[^\]\\])*(\\s| "
    r"))(?:\\.|[^\]\\])*\]|(?<!\\)\.|\\D|\\P\{[^}]*\}|(?<!\\)\))([*+]|\{\d*,?\d*\})"
)
# a class that names white space and something else, many times
_WIDE = re.compile(
    r"\[(?!\^)(?!(?:\\[srnt]| )+\])(?=(?:\\.|[^\]\\])*?(?:\\[sSWDPx]| ))(?:\\.|[^\]\\])*\]([*+]|\{\d*,?\d*\})"
)
_CLASS = re.compile(r"\[(?!\^)(?:\\.|[^\]\\])*\]")  # of characters that are named, which is harmless
_SEEN = 20  # times that a pair must have been seen
_UNICODE_KINDS = {"L": "letter", "N": "number", "P": "sign", "S": "sign", "M": "mark"}
# characters of each kind; what pre-tokenizers tell apart is there
_KINDS = {
    "lower": "aestlvmdrz",
    "upper": "AESTZ",
    "digit": "0189",
    "space": " ",
    "line": "\n",
    "white": "\t\r\u00a0\u3000",
    "quote": "'",
    "underscore": "_",
    "punctuation": '!"#$%&()*+,-./:;<=>?@[\\]^`{|}~',
    "ideograph": "世界日本語",
    "letter": "éßжωЖשعकกのカ한ªǅ",
    "number": "²٣५Ⅷ½",
    "sign": "。，！？「」…—’€©😀",
    "mark": "\u0301\u093e\u0e49\u0308",
}
_LEFT = frozenset(_KINDS)
_WORDS = ("lower", "upper", "digit", "ideograph", "letter", "number")
# a letter of another script, a number or a mark may join what stands before it when it is normalised
_RIGHT = _LEFT - {"letter", "number", "mark"}


class Part(NamedTuple):
    """A part of a text, and the characters before it that it is encoded behind ("" for the first)."""

    context: str
    text: str


class Cuts:
    """The cuts that a tokenizer allows, in parts of `limit` characters (more where there are none)."""

    def __init__(self, tokenizer: Tokenizer, name: str = "the tokenizer", limit: int = PART_CHARS) -> None:
        self._tokenizer, self._name, self._limit = tokenizer, name, limit

    def parts(self, chunks: Iterable[str], source: str) -> Iterator[Part]:
        """The text that the chunks concatenate to, in parts; the same ones however it comes in chunks.

        Raises DataError, naming `source`, where more than MAX_UNCUT_CHARS characters stand between two cuts.
        """
        text, low, before, looked = (
            "",
            0,
            "",
            0,
        )  # the part begins at `low`; up to `looked` behind it there is no cut
        for chunk in chunks:
            text, low = text[low:] + chunk, 0
            while len(text) - low >= (reach := looked + self._limit) + _AROUND:
                place = self._find(before, text, (low, low + max(looked, self._limit // 2), low + reach))
                if place is None:
                    looked = reach
                    if looked > MAX_UNCUT_CHARS:
                        raise DataError(
                            f"{source}: has more than {MAX_UNCUT_CHARS:,} characters in which {self._name} "
                            "allows no cut, too many to encode at once; cut the document, or leave it out"
                        )
                    continue
                yield Part(before[-CONTEXT_CHARS:], text[low:place])
                before, low, looked = (before + text[max(low, place - _AROUND) : place])[-_AROUND:], place, 0
        yield Part(before[-CONTEXT_CHARS:], text[low:])

    @cached_property
    def pairs(self) -> frozenset[tuple[str, str]]:
        """The pairs of kinds of characters between which a cut is allowed; prints a line where there are
        none.
        """
        pairs = self._joined_by_no_word or self._joined_by_no_entry
        if not pairs:
            say(f"{self._name} allows no cut of which its ids are sure: long documents are encoded whole")
        return pairs

    def _find(self, before: str, text: str, place: tuple[int, int, int]) -> int | None:
        """The last cut of `text` in (low, high] that holds; `before` is what precedes `text[start:]`."""
        start, low, high = place
        tries = 0
        for cut in range(high, max(low, start), -1):
            if (_kind(text[cut - 1]), _kind(text[cut])) in self.pairs:
                left = (before + text[max(start, cut - _AROUND) : cut])[-_AROUND:]
                if self._holds(left, text[cut : cut + _AROUND]):
                    return cut
                tries += 1
                if tries == _TRIES:
                    return None
        return None

    def _holds(self, left: str, right: str) -> bool:
        """Whether the text around a cut has the same ids encoded at once and in two parts."""
        context = left[-CONTEXT_CHARS:]
        texts = [left + right, left, context, context + right]
        whole, first, known, second = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        if len(left) in _inner_places(whole, by_word=bool(self._joined_by_no_word)):
            return False
        apart: bool = (
            second.ids[: len(known)] == known.ids and whole.ids == first.ids + second.ids[len(known) :]
        )
        return apart

    @cached_property
    def _joined_by_no_word(self) -> frozenset[tuple[str, str]]:
        """The pairs that no word of the pre-tokenizer has side by side, in any of many random texts."""
        if _rewrites_far_apart(self._tree["normalizer"]) or any(
            _WIDE.search(p) or _FAR.search(_CLASS.sub("x", p))
            for p in _patterns(self._tree["pre_tokenizer"], "Regex")
        ):
            return frozenset()
        seen: Counter[tuple[str, str]] = Counter()
        joined: set[tuple[str, str]] = set()
        for text, encoding in zip(
            self._probes, self._tokenizer.encode_batch(self._probes, add_special_tokens=False), strict=True
        ):
            inner = _inner_places(encoding, by_word=True)
            pairs = [(_kind(a), _kind(b)) for a, b in pairwise(text)]
            seen.update(pairs)
            joined |= {pair for place, pair in enumerate(pairs, start=1) if place in inner}
        # what one kind of letters or digits is joined with, all are: a pattern that does it may be rare
        joined |= {(kind, right) for left, right in joined if left in _WORDS for kind in _WORDS}
        return (
            frozenset(p for p, count in seen.items() if count >= _SEEN and p[0] in _LEFT and p[1] in _RIGHT)
            - joined
        )

    @cached_property
    def _joined_by_no_entry(self) -> frozenset[tuple[str, str]]:
        """For a BPE that takes the text as one word: the pairs that no entry of the vocabulary has side by
        side.
        """
        model, words = self._tree["model"], self._tokenizer.pre_tokenizer
        whole_words = ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges", "dropout")
        if (
            model["type"] != "BPE"
            or any(model.get(key) for key in whole_words)
            or not _keeps_kinds(self._tree["normalizer"])
        ):
            return frozenset()
        if words is not None and any(
            len(words.pre_tokenize_str(text.replace(" ", "▁"))) > 1 for text in self._probes
        ):
            return frozenset()
        joined = {
            (_kind(a), _kind(b)) for entry in model["vocab"] for a, b in pairwise(entry.replace("▁", " "))
        }
        # the right one is in the vocabulary, or is written as bytes: so it joins no unknown character before
        # it
        known = {"space"} if "▁" in model["vocab"] or " " in model["vocab"] else set()
        known |= {"line"} if "\n" in model["vocab"] or model.get("byte_fallback") else set()
        return (
            frozenset((left, right) for left in ("lower", "upper", "digit", "ideograph") for right in known)
            - joined
        )

    @cached_property
    def _tree(self) -> dict[str, Any]:
        tree: dict[str, Any] = json.loads(self._tokenizer.to_str())
        return tree

    @cached_property
    def _probes(self) -> list[str]:
        """Random texts, always the same ones: each of a few kinds of characters, and of a string that may be
        taken apart oddly.
        """
        draw = random.Random(0)
        strings = ["'s", "'LL", "12345", "   ", "\n\n", "word", "Word", *_odd_strings(self._tree)]
        texts = []
        for _ in range(_PROBES):
            units = [*draw.sample(list(_KINDS.values()), 4), [draw.choice(strings)]]
            texts.append("".join(draw.choice(draw.choice(units)) for _ in range(_PROBE_UNITS)))
        return texts


def _inner_places(encoding: Encoding, by_word: bool) -> set[int]:
    """The places in a text that lie inside of one word, or else of one token."""
    spans: dict[int, tuple[int, int]] = {}
    for number, (word, (low, high)) in enumerate(zip(encoding.word_ids, encoding.offsets, strict=True)):
        key = word if by_word and word is not None else -1 - number
        first, last = spans.get(key, (low, high))
        spans[key] = min(first, low), max(last, high)
    return {place for low, high in spans.values() for place in range(low + 1, high)}


@lru_cache(maxsize=1 << 14)
def _kind(char: str) -> str:
    """The kind of a character, one of _KINDS or "" for those beside which no text is cut."""
    for kind, chars in _KINDS.items():
        if char in chars:
            return kind
    if char.isascii():
        return "lower" if char.islower() else "upper" if char.isupper() else "digit" if char.isdigit() else ""
    if char.isspace():
        return "white"
    if "\u4e00" <= char <= "\u9fff":
        return "ideograph"
    return _UNICODE_KINDS.get(unicodedata.category(char)[0], "")


def _odd_strings(tree: dict[str, Any]) -> list[str]:
    """Strings that this tokenizer takes apart in a way of its own: its added tokens, and what its patterns
    spell out.
    """
    odd = [token["content"] for token in tree["added_tokens"]][:1000]
    for pattern in _patterns([tree["normalizer"], tree["pre_tokenizer"]], "String", "Regex", "delimiter"):
        odd += re.findall(r"[^\\()\[\]{}|?*+.^$]{2,}", pattern)
        odd += sorted(set(re.findall(r"[^\w\s\\]", pattern)))
    return odd


def _patterns(tree: Any, *kinds: str) -> Iterator[str]:
    """Every pattern of a part of a tokenizer.json that is of these kinds: "String", "Regex" or
    "delimiter".
    """
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key in kinds and isinstance(value, str):
                yield value
            else:
                yield from _patterns(value, *kinds)
    elif isinstance(tree, list):
        for value in tree:
            yield from _patterns(value, *kinds)


def _rewrites_far_apart(normalizer: Any) -> bool:
    """Whether a normaliser replaces by a regular expression that may reach over more than white space."""
    for part in _steps(normalizer):
        regex = part["pattern"].get("Regex") if part["type"] == "Replace" else None
        if regex is not None and re.search(r"[*+{^$]|\\[AzZbB]|\(\?", _WHITE.sub("", regex)):
            return True
    return False


def _keeps_kinds(normalizer: Any) -> bool:
    """Whether letters, digits, ideographs, spaces ("▁" for one) and line feeds keep their kind, but at the
    start of a text.
    """
    return all(
        part["type"] in ("Prepend", "NFC", "NFD", "NFKC", "NFKD")
        or (part["type"] == "Replace" and (part["pattern"], part["content"]) == ({"String": " "}, "▁"))
        for part in _steps(normalizer)
    )


def _steps(normalizer: Any) -> list[dict[str, Any]]:
    """The normalisers that a normaliser consists of."""
    if normalizer is None:
        return []
    if normalizer["type"] == "Sequence":
        return [step for part in normalizer["normalizers"] for step in _steps(part)]
    return [normalizer]
