"""How a preparation is cut off and goes on: the job and its journal."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from hybridtrain.console import say
from hybridtrain.data import manifest as m
from hybridtrain.data.manifest import Count, Manifest, PrepareSettings, SourceInfo
from hybridtrain.data.sources import LeftOut, SourceFile
from hybridtrain.data.writer import WriterState, split_files
from hybridtrain.files.durable import file_digest, write_atomically
from hybridtrain.files.untrusted import UntrustedFileError, read_json

CUTS = 2  # raised when documents are cut into other pieces than before


class Journal(BaseModel):
    """How far a preparation has come: `pieces` of source file number `file` are in the shards, `documents`
    were begun.

    `blank_lines` were left out of the files before it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: tuple[SourceInfo, ...]
    settings: PrepareSettings
    software: str
    tokenizer_xxh3: str
    compression_xxh3: str
    file: Count = 0
    pieces: Count = 0
    documents: Count = 0
    blank_lines: Count = 0
    train: WriterState = WriterState()
    validation: WriterState = WriterState()


@dataclass(frozen=True)
class Input:
    """A source file with its digest and, to notice changes while it is read, its time of change."""

    file: SourceFile
    info: SourceInfo
    mtime_ns: int


@dataclass(frozen=True)
class Job:
    """One preparation, as asked for."""

    inputs: tuple[Input, ...]
    out: Path
    tokenizer: Path | None
    settings: PrepareSettings
    left_out: tuple[LeftOut, ...] = ()

    @property
    def sources(self) -> tuple[SourceInfo, ...]:
        return tuple(entry.info for entry in self.inputs)

    def made_of_same(self, other: Manifest | Journal) -> bool:
        """Whether `other` has the same source bytes and settings, whatever the files are called."""
        mine, theirs = (
            [(s.use, s.kind, s.size, s.xxh3) for s in sources] for sources in (self.sources, other.sources)
        )
        return mine == theirs and self.settings == other.settings


def read_journal(job: Job) -> Journal | None:
    """The journal of an interrupted preparation of the same job, or None; says so where there is one of
    another job.
    """
    path = job.out / m.JOURNAL
    try:
        sealed = read_json(path, dict[str, Any], m.MAX_MANIFEST_BYTES)
        journal = Journal.model_validate_json(json.dumps(sealed.get("journal")), strict=True)
        same = (
            sealed.get("xxh3") == _seal(journal)
            and job.made_of_same(journal)
            and journal.software == software()
        )
        same = same and file_digest(job.out / m.TOKENIZER) == journal.tokenizer_xxh3
        same = same and file_digest(job.out / m.COMPRESSION) == journal.compression_xxh3
    except FileNotFoundError:
        if not path.exists():
            return None
        same = False
    except (UntrustedFileError, ValidationError):
        same = False
    if not same:
        say(f"{job.out}: an unfinished preparation of other sources or settings lies here; starting over")
        return None
    say(f"{job.out}: resuming after {journal.documents:,} documents")
    return journal


def write_journal(out: Path, journal: Journal) -> None:
    """Make the journal durable, with its own checksum: another position would leave documents out, or take
    them twice.
    """
    write_atomically(
        out / m.JOURNAL, f'{{"xxh3":"{_seal(journal)}","journal":{journal.model_dump_json()}}}\n'.encode()
    )


def _seal(journal: Journal) -> str:
    return xxhash.xxh3_128(journal.model_dump_json().encode()).hexdigest()


def clear(out: Path) -> None:
    """Delete what an earlier preparation wrote, the manifest first."""
    fixed = [out / name for name in (m.MANIFEST, m.JOURNAL, m.TOKENIZER, m.COMPRESSION)]
    for path in [*fixed, *(p for split in m.SPLITS for p in split_files(out, split))]:
        path.unlink(missing_ok=True)


def software() -> str:
    """The versions that also decide the bytes: those of the library may split words differently, those of
    this package may cut texts elsewhere.
    """
    return f"tokenizers {tokenizers.__version__}, cuts {CUTS}"
