"""Byte-level BPE: trained on the corpus, or loaded from any tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hybridtrain.errors import DataError
from hybridtrain.untrusted import UntrustedFileError, read_bytes

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
MAX_TOKENS = 1 << 24  # as many rows are made of embeddings and of tables by token id
MAX_BYTES = 1 << 28  # of a tokenizer.json


def train_tokenizer(texts: Iterable[str], vocab_size: int, progress: bool = False) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` entries (fewer where the texts have no more pairs), the same for the same texts.

    Raises DataError where `vocab_size` has no room for the 256 bytes and the separator.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(f"vocab_size={vocab_size} is too small; 256 bytes and the separator need at least {MIN_VOCAB_SIZE}")
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
    """The tokenizer in a tokenizer.json, without truncation or padding; special tokens written in a text are plain text to it.

    Raises DataError where the file is missing or cannot be parsed.
    """
    try:
        text = read_bytes(Path(path), MAX_BYTES).decode("utf-8")
    except OSError as error:
        raise DataError(f"{path}: the tokenizer cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not a tokenizer.json: not UTF-8 at byte {error.start}") from None
    except UntrustedFileError as error:
        raise DataError(str(error)) from None
    with library_errors(f"{path}: is not a tokenizer.json that the tokenizers library can load"):
        tokenizer = _for_encoding(Tokenizer.from_str(text))
        size = vocabulary_size(tokenizer)
    if size > MAX_TOKENS:
        raise DataError(f"{path}: has a token with the id {size - 1:,}; ids may be less than {MAX_TOKENS:,}")
    return tokenizer


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turns whatever the tokenizers library raises into a DataError that begins with `what`.

    It raises bare Exception for what is wrong with a tokenizer or a text, and a BaseException of its own where it panics.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise DataError(f"{what}: {str(error)[:500]}") from None


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """V: one more than the highest id, added tokens included (ids may have holes)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def find_separator(tokenizer: Tokenizer, name: str | None = None) -> tuple[str, int]:
    """The token that stands before each document, and its id: `name`, else the first present of KNOWN_SEPARATORS.

    Raises DataError where there is none.
    """
    for token in (name,) if name else KNOWN_SEPARATORS:
        token_id = tokenizer.token_to_id(token)
        if token_id is not None:
            return token, token_id
    if name:
        present = [token for token in KNOWN_SEPARATORS if tokenizer.token_to_id(token) is not None]
        raise DataError(f"separator {name!r} is no token of the tokenizer; of the usual ones it has {', '.join(present) or 'none'}")
    raise DataError(f"the tokenizer has none of {', '.join(KNOWN_SEPARATORS)}; name its separator token with --separator TOKEN")


def _for_encoding(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A document that spells out the separator must not become two documents.
    tokenizer.encode_special_tokens = True
    return tokenizer
