"""Makes a data folder from texts: trains or takes a tokenizer, holds documents out, writes shards; resumes where it was cut off.

The order of work: digest the sources, train or copy the tokenizer, encode piece by piece with a commit to `journal.json`
every 64 MiB of text, and write `manifest.json` last. The same sources and settings give the same bytes, interrupted or not.
"""

from __future__ import annotations

import fcntl
import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from tokenizers import Tokenizer

from hybridtrain.data import manifest as m
from hybridtrain.data.compress import compression_map
from hybridtrain.data.holdout import Holdout, choose_holdout
from hybridtrain.data.manifest import Manifest, PrepareSettings, SourceInfo, SplitInfo, SplitName
from hybridtrain.data.progress import EncodingProgress
from hybridtrain.data.sources import Piece, SourceFile, file_digest, list_files, read_pieces
from hybridtrain.data.tokenizer import MIN_VOCAB_SIZE, find_separator, load_tokenizer, train_tokenizer, vocabulary_size
from hybridtrain.data.writer import SplitWriter, StaleStateError, WriterState, split_files
from hybridtrain.errors import DataError
from hybridtrain.settings import DataSettings

TOKENIZER_TRAINING_CHARS = 1 << 30
_COMMIT_BYTES = 64 << 20
_BATCH_CHARS = 2 << 20
_LOCK = ".lock"
_console = Console(stderr=True)


class Journal(BaseModel):
    """How far a preparation has come: `pieces` of source file number `file` are in the shards, `documents` were begun."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: tuple[SourceInfo, ...]
    settings: PrepareSettings
    software: str
    tokenizer_xxh3: str
    file: int = 0
    pieces: int = 0
    documents: int = 0
    train: WriterState = WriterState()
    validation: WriterState = WriterState()


@dataclass(frozen=True)
class _Input:
    """A source file with its digest and, to notice changes while it is read, its time of change."""

    file: SourceFile
    info: SourceInfo
    mtime_ns: int


@dataclass(frozen=True)
class _Job:
    """One preparation, as asked for."""

    inputs: tuple[_Input, ...]
    out: Path
    tokenizer: Path | None
    settings: PrepareSettings

    @property
    def sources(self) -> tuple[SourceInfo, ...]:
        return tuple(entry.info for entry in self.inputs)

    def made_of_same(self, other: Manifest | Journal) -> bool:
        """Whether `other` has the same source bytes and settings, whatever the files are called."""
        mine, theirs = ([(s.use, s.size, s.xxh3) for s in sources] for sources in (self.sources, other.sources))
        return mine == theirs and self.settings == other.settings


def prepare(
    sources: Sequence[str | Path],
    out: Path | str,
    *,
    vocab_size: int = 4096,
    tokenizer: Path | str | None = None,
    separator: str | None = None,
    validation_fraction: float = 0.05,
    validation_sources: Sequence[str | Path] = (),
    text_field: str = "text",
    shard_tokens: int = 50_000_000,
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Make the data folder `out` and return its manifest; does nothing where it is already made of these sources and settings.

    `tokenizer` is a tokenizer.json to use instead of training one of `vocab_size` entries on the training documents.
    `validation_sources` are held out as they are, and then nothing of `sources` is. An interrupted call resumes when
    repeated. Raises DataError for bad sources or settings, where `out` holds other data and not `overwrite`, and where
    another process is preparing it.
    """
    with _locked(Path(out), wait=False):
        job = _plan(
            sources, Path(out), vocab_size, tokenizer, separator, validation_fraction, validation_sources, text_field, shard_tokens
        )
        return _prepare(job, overwrite, progress)


def ensure_prepared(data: DataSettings, progress: bool = True) -> None:
    """Make `data.path` from `data.source` where it is not made yet; of several processes on one machine one does it.

    Does nothing where the folder has a manifest or there is no source. Raises DataError as `prepare` does.
    """
    out = Path(data.path)
    if (out / m.MANIFEST).exists() or not data.source:
        return
    with _locked(out, wait=True):
        if not (out / m.MANIFEST).exists():
            job = _plan(data.source, out, data.vocab_size, data.tokenizer, None, data.validation_fraction, (), "text", 50_000_000)
            _prepare(job, overwrite=False, progress=progress)


def _plan(
    sources: Sequence[str | Path],
    out: Path,
    vocab_size: int,
    tokenizer: Path | str | None,
    separator: str | None,
    validation_fraction: float,
    validation_sources: Sequence[str | Path],
    text_field: str,
    shard_tokens: int,
) -> _Job:
    """Check the settings and sources and take the sources' digests."""
    if shard_tokens < 1:
        raise DataError(f"shard_tokens={shard_tokens} must be at least 1")
    if not tokenizer and vocab_size < MIN_VOCAB_SIZE:
        raise DataError(f"vocab_size={vocab_size} is too small; 256 bytes and the separator need at least {MIN_VOCAB_SIZE}")
    files = list_files([*sources, *validation_sources])
    corpus = list_files(sources)
    held_out = files[len(corpus) :]
    twice = {f.path.resolve() for f in corpus} & {f.path.resolve() for f in held_out}
    if twice:
        raise DataError(f"{min(twice)}: is both in the corpus and in the validation text; leave it out of one")
    inputs = [_take(file, "corpus") for file in corpus] + [_take(file, "validation") for file in held_out]
    settings = PrepareSettings(
        vocab_size=0 if tokenizer else vocab_size,
        tokenizer=_digest_tokenizer(Path(tokenizer)) if tokenizer else "",
        separator=separator or "",
        validation_fraction=0.0 if validation_sources else validation_fraction,
        text_field=text_field,
        shard_tokens=shard_tokens,
    )
    return _Job(tuple(inputs), out, Path(tokenizer) if tokenizer else None, settings)


def _prepare(job: _Job, overwrite: bool, progress: bool) -> Manifest:
    """Decide between nothing to do, resuming and starting over; the lock is held."""
    if (job.out / m.MANIFEST).exists() and not overwrite:
        made = m.read_manifest(job.out)
        if job.made_of_same(made):
            _console.print(f"{job.out} is already made of these sources and settings; nothing to do", highlight=False)
            return made
        raise DataError(
            f"{job.out}: already holds data of other sources or settings; choose another folder or replace it with --overwrite"
        )
    journal = None if overwrite else _read_journal(job)
    holdout = choose_holdout(job.settings.validation_fraction, _documents(job))
    if journal is not None:
        try:
            return _encode(job, journal, holdout, progress)
        except StaleStateError as error:
            _console.print(f"{job.out}: cannot resume: {error}; starting over", highlight=False)
    _clear(job.out)
    return _encode(job, _begin(job, holdout, progress), holdout, progress)


def _begin(job: _Job, holdout: Holdout, progress: bool) -> Journal:
    """Write the tokenizer, the compression map and a journal at position zero."""
    if job.tokenizer is not None:
        tokenizer = load_tokenizer(job.tokenizer)
        content = job.tokenizer.read_bytes()
    else:
        tokenizer = train_tokenizer(_training_texts(job, holdout), job.settings.vocab_size, progress)
        content = tokenizer.to_str(pretty=True).encode()
    find_separator(tokenizer, job.settings.separator or None)
    m.write_atomically(job.out / m.TOKENIZER, content)
    array = io.BytesIO()
    np.save(array, compression_map(tokenizer))
    m.write_atomically(job.out / m.COMPRESSION, array.getvalue())
    journal = Journal(
        sources=job.sources,
        settings=job.settings,
        software=_software(),
        tokenizer_xxh3=xxhash.xxh3_128(content).hexdigest(),
    )
    _write_journal(job.out, journal)
    return journal


def _encode(job: _Job, journal: Journal, holdout: Holdout, progress: bool) -> Manifest:
    """Encode everything after the journal's position, finish the shards and write the manifest."""
    tokenizer = load_tokenizer(job.out / m.TOKENIZER)
    separator, separator_id = find_separator(tokenizer, job.settings.separator or None)
    size = vocabulary_size(tokenizer)
    dtype = "uint16" if size <= 1 << 16 else "uint32"
    writers: dict[SplitName, SplitWriter] = {}
    try:
        for split in m.SPLITS:
            state = journal.train if split == "train" else journal.validation
            writers[split] = SplitWriter(job.out, split, dtype, job.settings.shard_tokens, state)
        with EncodingProgress(sum(s.size for s in job.sources), enabled=progress) as bar:
            _encode_files(job, journal, holdout, tokenizer, separator_id, writers, bar)
        train, validation = writers["train"].finish(), writers["validation"].finish()
    finally:
        for writer in writers.values():
            writer.close()
    return _finish(job, size, dtype, (separator, separator_id), train, validation)


def _encode_files(
    job: _Job,
    journal: Journal,
    holdout: Holdout,
    tokenizer: Tokenizer,
    separator_id: int,
    writers: dict[SplitName, SplitWriter],
    bar: EncodingProgress,
) -> None:
    """Append the pieces after the journal's position to the writers, with a commit after every shard and 64 MiB of text."""
    documents, uncommitted = journal.documents, 0
    for number in range(journal.file, len(job.inputs)):
        entry = job.inputs[number]
        done = journal.pieces if number == journal.file else 0
        pieces = read_pieces(entry.file, job.settings.text_field)
        for _ in range(done):
            next(pieces)
        for piece, ids in _encoded(tokenizer, pieces):
            documents += piece.first
            held_out = entry.info.use == "validation" or holdout.is_validation(documents - 1)
            size = len(piece.text.encode())
            full = writers["validation" if held_out else "train"].append([separator_id] * piece.first + ids, piece.first, size)
            done += 1
            uncommitted += size
            bar.advance(piece, size)
            if full or uncommitted >= _COMMIT_BYTES:
                states = {split: writer.commit() for split, writer in writers.items()}
                position = {"file": number, "pieces": done, "documents": documents}
                _write_journal(job.out, journal.model_copy(update=position | states))
                uncommitted = 0
        bar.finish_file(entry.info.size)
        stat = entry.file.path.stat()
        if (stat.st_size, stat.st_mtime_ns) != (entry.info.size, entry.mtime_ns):
            raise DataError(f"{entry.file.name}: changed while it was read; run the command again")


def _encoded(tokenizer: Tokenizer, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, list[int]]]:
    """The pieces with their token ids, encoded in batches."""
    batch: list[Piece] = []
    chars = 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece.text)
        if chars >= _BATCH_CHARS:
            yield from _encode_batch(tokenizer, batch)
            batch, chars = [], 0
    yield from _encode_batch(tokenizer, batch)


def _encode_batch(tokenizer: Tokenizer, batch: list[Piece]) -> Iterator[tuple[Piece, list[int]]]:
    encodings = tokenizer.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
    return zip(batch, (encoding.ids for encoding in encodings), strict=True)


def _finish(job: _Job, size: int, dtype: str, separator: tuple[str, int], train: SplitInfo, validation: SplitInfo) -> Manifest:
    manifest = Manifest.model_validate(
        {
            "format": m.FORMAT,
            "vocab_size": size,
            "dtype": dtype,
            "separator": separator[0],
            "separator_id": separator[1],
            "tokenizer_xxh3": file_digest(job.out / m.TOKENIZER),
            "compression_xxh3": file_digest(job.out / m.COMPRESSION),
            "compressed_size": int(np.load(job.out / m.COMPRESSION).max()) + 1,
            "train": train,
            "validation": validation,
            "sources": job.sources,
            "settings": job.settings,
        }
    )
    m.write_atomically(job.out / m.MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())
    (job.out / m.JOURNAL).unlink()
    _console.print(
        f"{job.out}: {size:,} tokens in the vocabulary; train {train.tokens:,} tokens in {train.documents:,} documents; "
        f"validation {validation.tokens:,} tokens in {validation.documents:,} documents",
        highlight=False,
    )
    return manifest


def _documents(job: _Job) -> Iterator[Piece]:
    """The first piece of every document of the corpus."""
    for entry in job.inputs:
        if entry.info.use == "corpus":
            yield from (piece for piece in read_pieces(entry.file, job.settings.text_field) if piece.first)


def _training_texts(job: _Job, holdout: Holdout) -> Iterator[str]:
    """The training documents in order, up to TOKENIZER_TRAINING_CHARS."""
    documents, chars = 0, 0
    for entry in job.inputs:
        for piece in read_pieces(entry.file, job.settings.text_field):
            documents += piece.first
            if entry.info.use == "validation" or holdout.is_validation(documents - 1):
                continue
            if chars >= TOKENIZER_TRAINING_CHARS:
                _console.print(f"the tokenizer is trained on the first {chars:,} characters of the corpus", highlight=False)
                return
            chars += len(piece.text)
            yield piece.text


def _take(file: SourceFile, use: str) -> _Input:
    try:
        stat, digest = file.path.stat(), file_digest(file.path)
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read: {error.strerror}") from None
    return _Input(
        file, SourceInfo.model_validate({"name": file.name, "use": use, "size": stat.st_size, "xxh3": digest}), stat.st_mtime_ns
    )


def _digest_tokenizer(path: Path) -> str:
    load_tokenizer(path)
    return file_digest(path)


def _read_journal(job: _Job) -> Journal | None:
    """The journal of an interrupted preparation of the same job, or None; says so where there is one of another job."""
    path = job.out / m.JOURNAL
    try:
        journal = Journal.model_validate_json(path.read_bytes())
        same = job.made_of_same(journal) and journal.software == _software()
        same = same and file_digest(job.out / m.TOKENIZER) == journal.tokenizer_xxh3
    except FileNotFoundError:
        if not path.exists():
            return None
        same = False
    except ValidationError:
        same = False
    if not same:
        _console.print(
            f"{job.out}: an unfinished preparation of other sources or settings lies here; starting over", highlight=False
        )
        return None
    _console.print(f"{job.out}: resuming after {journal.documents:,} documents", highlight=False)
    return journal


def _write_journal(out: Path, journal: Journal) -> None:
    m.write_atomically(out / m.JOURNAL, journal.model_dump_json().encode())


def _clear(out: Path) -> None:
    """Delete what an earlier preparation wrote, the manifest first."""
    fixed = [out / name for name in (m.MANIFEST, m.JOURNAL, m.TOKENIZER, m.COMPRESSION)]
    for path in [*fixed, *(p for split in m.SPLITS for p in split_files(out, split))]:
        path.unlink(missing_ok=True)


def _software() -> str:
    """What else decides the bytes: other versions of the library may split words differently."""
    return f"tokenizers {tokenizers.__version__}"


@contextmanager
def _locked(out: Path, wait: bool) -> Iterator[None]:
    """Hold the folder against other processes of this machine; the lock goes with the process that holds it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        stream = (out / _LOCK).open("w")
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror}") from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise DataError(f"{out}: another process is preparing this folder; wait for it or choose another one") from None
        yield
