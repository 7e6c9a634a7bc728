"""Byte-level BPE: trained on the corpus, or loaded from any tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hybridtrain.errors import DataError
from hybridtrain.files.untrusted import read_bytes

SEPARATOR = "<|endoftext|>"
KNOWN_SEPARATORS = (
    SEPARATOR,
    "<|end_of_text|>",
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<|im_end|>",
    "</s>",
    "<s>",
)
MIN_VOCAB_SIZE = 257
MAX_VOCAB_SIZE = 1 << 24
MAX_TOKENIZER_BYTES = 256 << 20


def train_tokenizer(texts: Iterable[str], vocab_size: int, progress: bool = False) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` entries (fewer where the texts have no more pairs), the same
    for the same texts.

    Raises DataError where `vocab_size` has no room for the 256 bytes and the separator.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"vocab_size={vocab_size} is too small; 256 bytes and the separator need at least "
            f"{MIN_VOCAB_SIZE}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _for_encoding(tokenizer)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer in a tokenizer.json, without truncation or padding; special tokens written in a text are
    plain text to it.

    Raises DataError where the file is missing or cannot be parsed, UntrustedFileError where it is longer than
    MAX_TOKENIZER_BYTES.
    """
    try:
        text = read_bytes(Path(path), MAX_TOKENIZER_BYTES).decode("utf-8")
    except OSError as error:
        raise DataError(f"{path}: the tokenizer cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not a tokenizer.json: not UTF-8 at byte {error.start}") from None
    with library_errors(f"{path}: is not a tokenizer.json that the tokenizers library can load"):
        tokenizer = _for_encoding(Tokenizer.from_str(text))
    try:
        size = vocabulary_size(tokenizer)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if size == 0:
        raise DataError(f"{path}: has no tokens")
    return tokenizer


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turns whatever the tokenizers library raises into a DataError that begins with `what`.

    It raises bare Exception for what is wrong with a tokenizer or a text, and a BaseException of its own
    where it panics.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, DataError, OSError):
        raise
    except BaseException as error:
        raise DataError(f"{what}: {str(error)[:500]}") from None


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """V: one more than the highest id, added tokens included (ids may have holes). DataError where that is
    above MAX_VOCAB_SIZE.
    """
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if size > MAX_VOCAB_SIZE:
        raise DataError(
            f"the tokenizer has the token id {size - 1:,}; the highest that is taken is "
            f"{MAX_VOCAB_SIZE - 1:,}"
        )
    return size


def find_separator(tokenizer: Tokenizer, name: str | None = None) -> tuple[str, int]:
    """The token that stands before each document, and its id: `name`, else the first present of
    KNOWN_SEPARATORS.

    Raises DataError where there is none.
    """
    for token in (name,) if name else KNOWN_SEPARATORS:
        with library_errors(f"separator {token!r}"):  # half of a character, for one
            token_id = tokenizer.token_to_id(token)
        if token_id is not None:
            return token, token_id
    if name:
        present = [token for token in KNOWN_SEPARATORS if tokenizer.token_to_id(token) is not None]
        raise DataError(
            f"separator {name!r} is not a token of the tokenizer; of the usual ones it has "
            f"{', '.join(present) or 'none'}"
        )
    raise DataError(
        f"the tokenizer has none of {', '.join(KNOWN_SEPARATORS)}; name its separator token with --separator "
        "TOKEN (data.separator in settings)"
    )


def for_texts(tokenizer: Tokenizer, separator: str) -> Tokenizer:
    """The tokenizer as texts are encoded with it: a text that spells the separator or a special token out
    does not have its id.

    Raises DataError where the separator is a token that texts consist of, such as a letter.
    """
    tokenizer.post_processor = None  # it only puts special tokens around; and it moves offsets
    special: dict[str, int | None] = {
        token.content: token_id
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
        if token.special
    }
    special[separator] = tokenizer.token_to_id(separator)
    if not _spelled(tokenizer, special):
        return tokenizer
    tree = json.loads(tokenizer.to_str())
    for token in tree["added_tokens"]:
        token["special"] |= token["content"] == separator
    plain = _made_of(tree)
    if hidden := [name for name in _spelled(plain, special) if _hide(tree["model"], name)]:
        tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] not in hidden]
        plain = _made_of(tree)
    if separator in _spelled(plain, special):
        raise DataError(
            f"separator {separator!r} is a token that texts are encoded with, so documents could not be told "
            "apart; choose one that stands for no text, e.g. a special token"
        )
    return plain


def _made_of(tree: dict[str, Any]) -> Tokenizer:
    with library_errors("the tokenizer cannot be made to take its separator for text"):
        tokenizer = _for_encoding(Tokenizer.from_str(json.dumps(tree)))
    moved = [t["content"] for t in tree["added_tokens"] if tokenizer.token_to_id(t["content"]) != t["id"]]
    if moved:
        raise DataError(
            f"the tokenizer cannot be made to take its separator for text: {moved[0]!r} would have another id"
        )
    return tokenizer


def _spelled(tokenizer: Tokenizer, special: dict[str, int | None]) -> list[str]:
    """Those tokens whose id a text that spells them out has."""
    forms = [
        (name, text)
        for name in special
        for text in (name, f"a {name} b", f"a{name}b", name * 2, name.strip(), name.upper())
    ]
    with library_errors("the tokenizer fails on a text"):
        encodings = tokenizer.encode_batch_fast([text for _, text in forms], add_special_tokens=False)
    found = {
        name for (name, _), encoding in zip(forms, encodings, strict=True) if special[name] in encoding.ids
    }
    return [name for name in special if name in found]


def _hide(model: dict[str, Any], name: str) -> bool:
    """Give a token's entry in a model's vocabulary a name that no text has; False where texts need the
    entry.
    """
    hidden = f"\ue000{name}\ue000"
    if model["type"] == "Unigram":
        ids = [i for i, (entry, _) in enumerate(model["vocab"]) if entry == name]
        if len(name) == 1 or model.get("unk_id") in ids:
            return False
        for i in ids:
            model["vocab"][i][0] = hidden
        return bool(ids)
    if len(name) == 1 or name not in model["vocab"] or model.get("unk_token") == name:
        return False
    merges = [
        tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge)
        for merge in model.get("merges", ())
    ]
    if any(name in merge for merge in merges):
        return False
    if merges:
        model["merges"] = [list(merge) for merge in merges if "".join(merge) != name]
    model["vocab"][hidden] = model["vocab"].pop(name)
    return True


def _for_encoding(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):  # of BPE; the same texts are to have the same ids
        tokenizer.model.dropout = None
    # A document that spells out the separator must not become two documents.
    tokenizer.encode_special_tokens = True
    return tokenizer
