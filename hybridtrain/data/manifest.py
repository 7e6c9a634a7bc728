"""What stands in a data folder: `manifest.json`, written last, describes every other file by size and
checksum.

    tokenizer.json            as loaded or trained
    compression.npy           int64 [V], token id -> compressed id
    SPLIT-00000.tokens        raw little-endian uint16 (V <= 65,536) or uint32
    SPLIT-00000.starts        raw little-endian int64: offsets, in tokens of this shard, where documents start
    journal.json              only while unfinished: how far a preparation has come

The separator token stands first in each document.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hybridtrain.data.sources import SourceKind
from hybridtrain.errors import DataError
from hybridtrain.files.untrusted import UntrustedFileError, read_json

FORMAT = 1
MANIFEST, JOURNAL, TOKENIZER, COMPRESSION = (
    "manifest.json",
    "journal.json",
    "tokenizer.json",
    "compression.npy",
)
SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, ...] = ("train", "validation")
MAX_MANIFEST_BYTES = 1 << 30  # a line for every source and shard
Count = Annotated[int, Field(ge=0, lt=1 << 56)]
_SHOWN = 10  # problems that one message lists
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardInfo(_Record):
    """One shard; its files are `name`.tokens and `name`.starts, with their xxh3 (128 bits)."""

    name: str = Field(pattern=r"^(train|validation)-\d{5,9}$")  # a file of this folder
    tokens: Count
    documents: Count
    tokens_xxh3: Digest
    starts_xxh3: Digest


class SplitInfo(_Record):
    """A split: tokens (separators included), documents that start in it, UTF-8 bytes of its text (separators
    excluded).
    """

    tokens: Count
    documents: Count
    bytes: Count
    shards: tuple[ShardInfo, ...]

    @property
    def digest(self) -> str:
        """xxh3 (128 bits) of the contents of its shards; "" for an empty split."""
        said = [f"{s.tokens} {s.tokens_xxh3} {s.starts_xxh3}" for s in self.shards]
        return xxhash.xxh3_128("\n".join(said).encode()).hexdigest() if self.tokens else ""

    @model_validator(mode="after")
    def _adds_up(self) -> SplitInfo:
        for name in ("tokens", "documents"):
            if (total := sum(getattr(shard, name) for shard in self.shards)) != getattr(self, name):
                raise ValueError(f"its shards have {total} {name}, not {getattr(self, name)}")
        if len({shard.name for shard in self.shards}) != len(self.shards):
            raise ValueError("a shard is named twice")
        return self


class SourceInfo(_Record):
    """A file the data was made from: `use` is "corpus", or "validation" for a file that is all held out."""

    name: str
    use: Literal["corpus", "validation"]
    kind: SourceKind
    size: Count
    xxh3: Digest


class PrepareSettings(_Record):
    """The settings that decide the output, beside the sources.

    `tokenizer` is the digest of a given tokenizer.json and then `vocab_size` 0, or "" for a trained one;
    `separator` "" takes the first usual one; `validation_fraction` is 0 where validation sources are given.
    """

    vocab_size: int = 4096
    tokenizer: str = ""
    separator: str = ""
    validation_fraction: float = 0.05
    text_field: str = "text"
    shard_tokens: int = 50_000_000


class Manifest(_Record):
    """The contents of `manifest.json`."""

    format: Literal[1]
    vocab_size: Annotated[int, Field(ge=1, le=1 << 24)]
    dtype: Literal["uint16", "uint32"]
    separator: str
    separator_id: Count
    tokenizer_xxh3: Digest
    compression_xxh3: Digest
    compressed_size: Count
    train: SplitInfo
    validation: SplitInfo
    sources: tuple[SourceInfo, ...]
    settings: PrepareSettings
    left_out: dict[str, Count] = {}  # files, and blank lines of JSON lines, by why they were not read

    @model_validator(mode="after")
    def _agrees(self) -> Manifest:
        if self.separator_id >= self.vocab_size:
            raise ValueError(f"separator_id={self.separator_id} is not one of the {self.vocab_size} tokens")
        if self.dtype == "uint16" and self.vocab_size > 1 << 16:
            raise ValueError(f"dtype=uint16 holds no {self.vocab_size} tokens")
        for split in SPLITS:
            if strays := [
                shard.name for shard in self.split(split).shards if not shard.name.startswith(f"{split}-")
            ]:
                raise ValueError(f"{strays[0]} is not a shard of {split}")
        return self

    def split(self, name: SplitName) -> SplitInfo:
        return self.train if name == "train" else self.validation

    def digests(self) -> dict[str, str]:
        """The splits' digests by name."""
        return {name: self.split(name).digest for name in SPLITS}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished data folder; DataError where it is missing, unfinished, damaged or of
    another format.
    """
    path = folder / MANIFEST
    try:
        tree = read_json(path, dict[str, Any], MAX_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(_absent(folder)) from None
    except (OSError, UntrustedFileError) as error:
        why = str(error).removeprefix(f"{path}: ")
        raise DataError(
            f"{path}: cannot be read: {why}; make the folder again with `hybridtrain data`"
        ) from None
    version = tree.get("format")
    if version != FORMAT:
        raise DataError(
            f"{path}: has format {version!r}, this version reads format {FORMAT}; make the folder again with "
            "`hybridtrain data`"
        )
    try:
        return Manifest.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:_SHOWN])
        raise DataError(
            f"{path}: is damaged: {wrong}; make the folder again with `hybridtrain data`"
        ) from None


def _absent(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such data folder; make it with `hybridtrain data SOURCE --out {folder}`"
    if (folder / JOURNAL).exists():
        return (
            f"{folder}: its preparation is unfinished; run the same `hybridtrain data` command again to go on"
        )
    return f"{folder}: has no {MANIFEST}; make the data with `hybridtrain data SOURCE --out {folder}`"
