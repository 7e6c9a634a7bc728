"""Tokenizer compression: tokens that differ only in case, accents, width or surrounding space share one id.

Defined by Engram (arXiv 2601.07372); the compressed ids enter the memory's hash, so the map belongs to the trained model.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, normalizers

from hybridtrain.data.tokenizer import library_errors, vocabulary_size
from hybridtrain.errors import DataError
from hybridtrain.untrusted import read_bytes

_LONE_SPACE = "\ue000"  # keeps a token that is only white space from being stripped to nothing
_UNDECODABLE = "\ufffd"
_BATCH = 8192
_HEADER = 1 << 16  # of a file of numpy


def compression_map(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """Token id -> compressed id, int64 [V]; compressed ids are 0 .. V'-1 in the order in which their keys first occur.

    A token's key is its decoded text, normalised (NFKC, NFD, no accents, lower case, white space collapsed and stripped);
    the text as it is where nothing is left of it; and the raw token where it is only part of a character.
    """
    normalizer = _normalizer()
    size = vocabulary_size(tokenizer)
    numbers: dict[str, int] = {}
    compressed = np.empty(size, np.int64)
    for low in range(0, size, _BATCH):
        ids = range(low, min(low + _BATCH, size))
        with library_errors("the tokenizer fails on its own tokens"):
            texts = tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
        for token_id, text in zip(ids, texts, strict=True):
            raw = tokenizer.id_to_token(token_id) if _UNDECODABLE in text else None
            key = raw or normalizer.normalize_str(text) or text
            compressed[token_id] = numbers.setdefault(key, len(numbers))
    return compressed


def to_npy(compression: npt.NDArray[np.int64]) -> bytes:
    """The map as the file that lies beside a tokenizer."""
    array = io.BytesIO()
    np.save(array, compression)
    return array.getvalue()


def read_map(path: Path, size: int) -> npt.NDArray[np.int64]:
    """The map of a file, int64 [V] with V = `size`. Raises DataError where it is damaged or another one."""
    try:
        array = np.load(io.BytesIO(read_bytes(path, size * 8 + _HEADER)), allow_pickle=False)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError, SyntaxError, MemoryError, TypeError, KeyError, OverflowError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: is no array of numpy: {error}") from None
    if not isinstance(array, np.ndarray) or array.shape != (size,) or array.dtype != np.int64:
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "a zip file"
        raise DataError(f"{path}: is {found}, not int64 [{size}]")
    if size and not 0 <= array.min() <= array.max() < size:
        raise DataError(f"{path}: has ids from {array.min()} to {array.max()}; they may be 0 to {size - 1}")
    return array


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), _LONE_SPACE),
            normalizers.Strip(),
            normalizers.Replace(_LONE_SPACE, " "),
        ]
    )
