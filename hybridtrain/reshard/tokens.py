"""A larger tokenizer in the place of a run's: whether it keeps every token, and how the table finds its rows
with it.

The hash of n-grams is over compressed ids (data/compress.py). Those of old tokens stay, so every old n-gram
keeps its rows; a new token has the id of the old ones that are spelt alike, or one of its own. Multipliers
and primes stay as well: drawn anew for more compressed ids they would be others. Products that are too large
for 63 bits wrap, as those of loaded multipliers may.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from hybridtrain.data.compress import compression_map
from hybridtrain.data.manifest import COMPRESSION, MANIFEST, TOKENIZER, read_manifest
from hybridtrain.data.tokenizer import load_tokenizer, vocabulary_size
from hybridtrain.errors import CheckpointError, UserError
from hybridtrain.files.durable import file_digest
from hybridtrain.kernels.engram_hash.addressing import Addressing, AddressingError
from hybridtrain.reshard.target import Target
from hybridtrain.run.init_from import read_compression_of

SHOWN = 10  # tokens that are named where more differ


@dataclass(frozen=True)
class NewTokenizer:
    """The parts of the tokenizer that go into a run folder and a checkpoint; `addressing` is JSON, None
    without a table.
    """

    content: bytes
    digest: str
    compression: npt.NDArray[np.int64]
    addressing: str | None


def take_tokenizer(path: Path, run: Path, info: dict[str, Any], target: Target) -> NewTokenizer:
    """The tokenizer.json `path` in the place of that of `run`, whose checkpoint has the description `info`.

    Raises UserError listing the tokens that it does not keep, or where the target's rows are too few or its
    data of another tokenizer; DataError where it cannot be read, and CheckpointError where the run folder
    lacks its own.
    """
    missing = [name for name in (TOKENIZER, COMPRESSION) if not (run / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{run} lacks {' and '.join(missing)}, with which --tokenizer {path} is compared"
        )
    ours, theirs = load_tokenizer(path), load_tokenizer(run / TOKENIZER)
    before, after = read_compression_of(run, info), compression_map(ours)
    problems = _changed_tokens(ours, theirs)
    if not problems:  # else the map differs because the tokens do
        problems = _changed_classes(ours, before, after)
    digest, data = file_digest(path), Path(target.settings.data.path)
    if (size := vocabulary_size(ours)) > target.vocab_size:
        problems.append(
            f"it has {size} tokens, the model rows for {target.vocab_size}; give --extend-vocab {size} or "
            "more"
        )
    if (data / MANIFEST).exists() and read_manifest(data).tokenizer_xxh3 != digest:
        problems.append(
            f"data.path={data} is of another tokenizer; give that of data made with `hybridtrain data "
            f"--tokenizer {path}`"
        )
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        lines = [
            f"--tokenizer {path}: it cannot take the place of {run / TOKENIZER}",
            *problems[:SHOWN],
            *more,
        ]
        raise UserError("\n  ".join(lines))
    addressing = None
    if info["addressing"]:
        try:
            addressing = dataclasses.replace(
                Addressing.from_json(info["addressing"], before), compression=after
            ).to_json()
        except AddressingError as error:
            raise CheckpointError(f"{run}: {error}") from None
    return NewTokenizer(path.read_bytes(), digest, after, addressing)


def _changed_tokens(ours: Tokenizer, theirs: Tokenizer) -> list[str]:
    ids = ours.get_vocab(with_added_tokens=True)
    return [
        f"{token!r} is {f'{ids[token]}' if token in ids else 'none'} of its tokens, and {number} of the run's"
        for token, number in sorted(
            theirs.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1]
        )
        if ids.get(token) != number
    ]


def _changed_classes(
    ours: Tokenizer, before: npt.NDArray[np.int64], after: npt.NDArray[np.int64]
) -> list[str]:
    """Old tokens that the table would take for others: those that are decoded otherwise, or holes that were
    filled.
    """
    return [
        f"token {number}, {ours.id_to_token(number)!r}, is spelt differently from the run's: the table would "
        "find other rows"
        for number in np.flatnonzero(after[: len(before)] != before).tolist()
    ]
