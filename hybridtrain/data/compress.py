"""Tokenizer compression: tokens that differ only in case, accents, width or surrounding space share one id.

Defined by Engram (arXiv 2601.07372); the compressed ids enter the memory's hash, so the map belongs to the trained model.
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, normalizers

from hybridtrain.data.tokenizer import vocabulary_size

_LONE_SPACE = "\ue000"  # keeps a token that is only white space from being stripped to nothing
_UNDECODABLE = "\ufffd"
_BATCH = 8192


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
