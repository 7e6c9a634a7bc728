"""Which documents are held out for validation: whole ones, by a hash of their position in the corpus."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import xxhash

from hybridtrain.errors import DataError

_SEED = 0x68796272


@dataclass(frozen=True)
class Holdout:
    """`fraction` of the documents, in expectation, but for two that may be assigned so that no split stays
    empty.
    """

    fraction: float
    always_train: int = -1
    always_validation: int = -1

    def is_validation(self, document: int) -> bool:
        """Whether the document at this position (0-based) is held out."""
        if document in (self.always_train, self.always_validation):
            return document == self.always_validation
        return _score(document) < self.fraction


def choose_holdout(fraction: float, documents: Iterable[object]) -> Holdout:
    """The rule for a corpus; reads as many of its documents as it takes to find one of each split, most often
    a few.

    Raises DataError where `fraction` is not in [0, 1) or the corpus has one document and `fraction` is above
    0.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"validation_fraction={fraction} must be at least 0 and below 1")
    if fraction == 0:
        return Holdout(0.0)
    scores: list[float] = []
    for number, _ in enumerate(documents):
        scores.append(_score(number))
        if min(scores[0], scores[-1]) < fraction <= max(scores[0], scores[-1]):
            return Holdout(fraction)
    if len(scores) < 2:
        raise DataError(
            f"the corpus is one document and validation_fraction={fraction} holds out whole documents; "
            "give a validation text (--validation FILE) or set the fraction to 0 (--validation-fraction 0)"
        )
    if min(scores) >= fraction:
        return Holdout(fraction, always_validation=scores.index(min(scores)))
    return Holdout(fraction, always_train=scores.index(max(scores)))


def _score(document: int) -> float:
    """Uniform in [0, 1)."""
    return (xxhash.xxh3_64_intdigest(document.to_bytes(8, "little"), seed=_SEED) >> 11) / 2.0**53
