"""Tokenizer compression: tokens that differ only in case, accents, width or surrounding space share one id.

Defined by Engram (arXiv 2601.07372); the compressed ids enter the hash of n-grams, so the map belongs to the
trained model.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, normalizers

from hybridtrain.data.tokenizer import MAX_VOCAB_SIZE, library_errors, vocabulary_size
from hybridtrain.errors import DataError
from hybridtrain.files.untrusted import read_bytes

_LONE_SPACE = "\ue000"  # keeps a token that is only white space from being stripped to nothing
_UNDECODABLE = "\ufffd"
_BATCH = 8192
_MAX_NPY = 8 * MAX_VOCAB_SIZE + 4096


def compression_map(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """Token id -> compressed id, int64 [V]; compressed ids are 0 .. V'-1 in the order in which their keys
    first occur.

    A token's key is its decoded text, normalised (NFKC, NFD, no accents, lower case, white space collapsed
    and stripped); the text as it is where nothing is left of it; and the raw token where it is only part of a
    character.
    """
    normalizer = _normalizer()
    size = vocabulary_size(tokenizer)
    numbers: dict[str, int] = {}
    compressed = np.empty(size, np.int64)
    for low in range(0, size, _BATCH):
        ids = range(low, min(low + _BATCH, size))
        with library_errors("the tokenizer cannot decode its own tokens"):
            texts = tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
        for token_id, text in zip(ids, texts, strict=True):
            raw = tokenizer.id_to_token(token_id) if _UNDECODABLE in text else None
            key = raw or normalizer.normalize_str(text) or text
            compressed[token_id] = numbers.setdefault(key, len(numbers))
    return compressed


def read_compression(path: Path, rows: int | None = None) -> npt.NDArray[np.int64]:
    """The map of a file that `to_npy` made, of at most `rows` tokens. Raises OSError, and DataError where it
    is not such a file.
    """
    content = read_bytes(path, _MAX_NPY)
    stream = io.BytesIO(content)
    try:
        form = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = form[np.lib.format.read_magic(stream)](stream)
    except (
        Exception
    ) as error:  # whatever numpy's reading of a header raises; it is Python's own, of literals alone
        raise DataError(f"{path}: is not an array of numpy: {str(error)[:200]}") from None
    if (
        dtype != np.dtype("<i8")
        or len(shape) != 1
        or shape[0] < 1
        or shape[0] * 8 != len(content) - stream.tell()
    ):
        raise DataError(
            f"{path}: says {dtype} {list(shape)} of {len(content) - stream.tell()} bytes; it must be int64 "
            "[tokens]"
        )
    compressed = np.frombuffer(content, "<i8", offset=stream.tell()).astype(np.int64)
    if compressed.min() < 0 or compressed.max() >= len(compressed):
        raise DataError(
            f"{path}: holds {compressed.min()} to {compressed.max()}, of {len(compressed)} tokens"
        )
    if rows is not None and len(compressed) > rows:
        raise DataError(f"{path}: is of {len(compressed)} tokens, the model of {rows}")
    return compressed


def to_npy(compression: npt.NDArray[np.int64]) -> bytes:
    """The map as the file that lies beside a tokenizer."""
    array = io.BytesIO()
    np.save(array, compression)
    return array.getvalue()


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
