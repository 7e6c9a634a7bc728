from __future__ import annotations

from collections.abc import Iterator

import pytest

from hybridtrain.data.holdout import choose_holdout
from hybridtrain.errors import DataError


def test_the_fraction_is_kept_and_the_choice_is_stable() -> None:
    holdout = choose_holdout(0.05, range(1000))
    chosen = [n for n in range(20_000) if holdout.is_validation(n)]
    assert 0.045 < len(chosen) / 20_000 < 0.055
    assert chosen == [n for n in range(20_000) if choose_holdout(0.05, range(20_000)).is_validation(n)]
    assert not any(choose_holdout(0.0, ()).is_validation(n) for n in range(1000))


@pytest.mark.parametrize("documents", [2, 3, 7, 40])
@pytest.mark.parametrize("fraction", [1e-9, 0.05, 0.5, 0.999999])
def test_no_split_is_empty(documents: int, fraction: float) -> None:
    holdout = choose_holdout(fraction, range(documents))
    assert 0 < sum(holdout.is_validation(n) for n in range(documents)) < documents


def test_few_documents_are_read() -> None:
    def endless() -> Iterator[int]:
        yield from range(10_000)
        pytest.fail("read the whole corpus")

    choose_holdout(0.05, endless())


def test_one_document_cannot_be_split() -> None:
    with pytest.raises(
        DataError, match=r"corpus is one document .* \(--validation FILE\) or set the fraction to 0"
    ):
        choose_holdout(0.05, range(1))
    with pytest.raises(DataError, match=r"validation_fraction=1.0 must be at least 0 and below 1"):
        choose_holdout(1.0, range(5))
