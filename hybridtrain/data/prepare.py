"""Makes a data folder from texts: trains or takes a tokenizer, holds documents out, writes shards; resumes
where it was cut off.

The order of work: digest the sources, train or copy the tokenizer, encode piece by piece with a commit to
`journal.json` every 64 MiB of text, and write `manifest.json` last. The same sources and settings give the
same bytes, interrupted or not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import xxhash

from hybridtrain.console import say
from hybridtrain.data import manifest as m
from hybridtrain.data.compress import compression_map, read_compression, to_npy
from hybridtrain.data.contents import compare, report
from hybridtrain.data.encode import Encoder, corpus_documents, encode_files, training_texts
from hybridtrain.data.holdout import Holdout, choose_holdout
from hybridtrain.data.journal import Input, Job, Journal, clear, read_journal, software, write_journal
from hybridtrain.data.manifest import Manifest, PrepareSettings, SourceInfo, SplitName
from hybridtrain.data.progress import EncodingProgress
from hybridtrain.data.sources import SourceFile, list_files
from hybridtrain.data.tokenizer import (
    MIN_VOCAB_SIZE,
    find_separator,
    for_texts,
    load_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from hybridtrain.data.unpack import unpacked_digest
from hybridtrain.data.writer import SplitWriter, StaleStateError
from hybridtrain.errors import DataError
from hybridtrain.files.durable import file_digest, write_atomically
from hybridtrain.files.lock import locked
from hybridtrain.settings.tree import DataSettings


class Choices(TypedDict, total=False):
    """The settings of PrepareSettings that a caller chooses."""

    vocab_size: int
    separator: str | None
    validation_fraction: float
    text_field: str
    shard_tokens: int


def prepare(
    sources: Sequence[str | Path],
    out: Path | str,
    *,
    tokenizer: Path | str | None = None,
    validation_sources: Sequence[str | Path] = (),
    overwrite: bool = False,
    progress: bool = True,
    **how: Unpack[Choices],
) -> Manifest:
    """Make the data folder `out` and return its manifest; does nothing where it is already made of these
    sources and settings.

    `tokenizer` is a tokenizer.json to use instead of training one of `vocab_size` entries on the training
    documents. `validation_sources` are held out as they are, and then nothing of `sources` is. Settings that
    `how` leaves out have the defaults of PrepareSettings. An interrupted call resumes when repeated. Raises
    DataError for bad sources or settings, where `out` holds other data and not `overwrite`, and where another
    process is preparing it.
    """
    settings = PrepareSettings.model_validate({**how, "separator": how.get("separator") or ""})
    job = _plan(sources, validation_sources, Path(out), tokenizer, settings)
    with locked(job.out, error=DataError):
        return _prepare(job, overwrite, progress)


def ensure_prepared(data: DataSettings, progress: bool = True) -> None:
    """Make `data.path` from `data.source` where it is not made yet; of several processes one does it, and the
    others wait.

    Does nothing where there is no source. Raises DataError as `prepare` does, and where a folder has another
    tokenizer or separator than the settings name; other differences are printed.
    """
    out = Path(data.path)
    if not data.source:
        return
    if not (out / m.MANIFEST).exists():
        with locked(out, wait=True, error=DataError):
            if not (out / m.MANIFEST).exists():
                asked = PrepareSettings.model_validate(
                    data.model_dump(include=set(PrepareSettings.model_fields) - {"tokenizer"})
                )
                _prepare(
                    _plan(data.source, data.validation, out, data.tokenizer, asked),
                    overwrite=False,
                    progress=progress,
                )
                return
    compare(data, m.read_manifest(out))


def _plan(
    sources: Sequence[str | Path],
    validation_sources: Sequence[str | Path],
    out: Path,
    tokenizer: Path | str | None,
    settings: PrepareSettings,
) -> Job:
    """Check the settings and sources and take the sources' digests."""
    if settings.shard_tokens < 1:
        raise DataError(f"shard_tokens={settings.shard_tokens} must be at least 1")
    if not tokenizer and settings.vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"vocab_size={settings.vocab_size} is too small; 256 bytes and the separator need at least "
            f"{MIN_VOCAB_SIZE}"
        )
    corpus, held_out, left_out = list_files(sources, validation_sources)
    if validation_sources:
        settings = settings.model_copy(update={"validation_fraction": 0.0})
    if tokenizer:
        load_tokenizer(tokenizer)
        settings = settings.model_copy(update={"vocab_size": 0, "tokenizer": file_digest(Path(tokenizer))})
    inputs = [_take(file, "corpus") for file in corpus] + [_take(file, "validation") for file in held_out]
    _look_for_copies(inputs)
    return Job(tuple(inputs), out, Path(tokenizer) if tokenizer else None, settings, tuple(left_out))


def _look_for_copies(inputs: Sequence[Input]) -> None:
    """Say which files have the same bytes; DataError where one of them is held out and another is not.

    Files whose names differ by their compression alone, as `gzip --keep` leaves them, are compared unpacked.
    """
    compressions: dict[str, set[str]] = {}
    for entry in inputs:
        compressions.setdefault(_bare_name(entry.file), set()).add(entry.file.compression)
    first: dict[str, Input] = {}
    copies: list[str] = []
    leaks: list[str] = []
    for entry in inputs:
        keys = [entry.info.xxh3]
        if entry.file.compression and len(compressions[_bare_name(entry.file)]) > 1:
            keys.append(unpacked_digest(entry.file.path, entry.file.compression, entry.file.name))
        others = [other for key in keys if (other := first.setdefault(key, entry)) is not entry]
        if others:
            pair = f"{entry.file.name} has the bytes of {others[0].file.name}"
            (copies if others[0].info.use == entry.info.use else leaks).append(pair)
    if leaks:
        raise DataError(
            "\n".join(
                [
                    "text of the corpus is in the validation text too; leave it out of one",
                    *(f"  {x}" for x in leaks),
                ]
            )
        )
    if copies:
        more = f", and {len(copies) - 1:,} more" if len(copies) > 1 else ""
        say(f"{len(copies):,} file(s) are copies, and are read as well: {copies[0]}{more}")


def _bare_name(file: SourceFile) -> str:
    return file.path.name.lower().removesuffix(file.compression)


def _prepare(job: Job, overwrite: bool, progress: bool) -> Manifest:
    """Decide between nothing to do, resuming and starting over; the lock is held."""
    if (job.out / m.MANIFEST).exists() and not overwrite:
        made = m.read_manifest(job.out)
        if job.made_of_same(made):
            say(f"{job.out} is already made of these sources and settings; nothing to do")
            say(report(made, job.left_out))
            return made
        raise DataError(
            f"{job.out}: already holds data of other sources or settings; choose another folder or replace "
            "it with --overwrite"
        )
    try:
        journal = None if overwrite else read_journal(job)
        holdout = choose_holdout(job.settings.validation_fraction, corpus_documents(job))
        if journal is not None:
            try:
                return _encode(job, journal, holdout, progress)
            except StaleStateError as error:
                say(f"{job.out}: cannot resume: {error}; starting over")
        return _encode(job, _begin(job, holdout, progress), holdout, progress)
    except OSError as error:
        raise DataError(
            f"{error.filename or job.out}: {error.strerror}; mend it and repeat the command to go on"
        ) from error


def _begin(job: Job, holdout: Holdout, progress: bool) -> Journal:
    """Write the tokenizer, the compression map and a journal at position zero, in place of what lay there."""
    if job.tokenizer is not None:
        tokenizer, content = load_tokenizer(job.tokenizer), job.tokenizer.read_bytes()
    else:
        tokenizer = train_tokenizer(training_texts(job, holdout), job.settings.vocab_size, progress)
        content = tokenizer.to_str(pretty=True).encode()
    for_texts(tokenizer, find_separator(tokenizer, job.settings.separator or None)[0])
    compression = to_npy(compression_map(tokenizer))
    clear(job.out)
    write_atomically(job.out / m.TOKENIZER, content)
    write_atomically(job.out / m.COMPRESSION, compression)
    journal = Journal(
        sources=job.sources,
        settings=job.settings,
        software=software(),
        tokenizer_xxh3=xxhash.xxh3_128(content).hexdigest(),
        compression_xxh3=xxhash.xxh3_128(compression).hexdigest(),
    )
    write_journal(job.out, journal)
    return journal


def _encode(job: Job, journal: Journal, holdout: Holdout, progress: bool) -> Manifest:
    """Encode everything after the journal's position, finish the shards and write the manifest."""
    tokenizer = load_tokenizer(job.out / m.TOKENIZER)
    separator, separator_id = find_separator(tokenizer, job.settings.separator or None)
    size, tokenizer = vocabulary_size(tokenizer), for_texts(tokenizer, separator)
    dtype = "uint16" if size <= 1 << 16 else "uint32"
    writers: dict[SplitName, SplitWriter] = {}
    try:
        for split in m.SPLITS:
            state = journal.train if split == "train" else journal.validation
            writers[split] = SplitWriter(job.out, split, dtype, job.settings.shard_tokens, state)
        with EncodingProgress(sum(s.size for s in job.sources), enabled=progress) as bar:
            blank_lines = encode_files(job, journal, holdout, Encoder(tokenizer, separator_id), writers, bar)
        train, validation = writers["train"].finish(), writers["validation"].finish()
    finally:
        for writer in writers.values():
            writer.close()
    left_out = Counter(entry.why for entry in job.left_out) | Counter({"blank lines": blank_lines})
    fields = {
        "format": m.FORMAT,
        "vocab_size": size,
        "dtype": dtype,
        "separator": separator,
        "separator_id": separator_id,
        "tokenizer_xxh3": journal.tokenizer_xxh3,
        "compression_xxh3": journal.compression_xxh3,
        "compressed_size": int(read_compression(job.out / m.COMPRESSION).max()) + 1,
        "train": train,
        "validation": validation,
        "sources": job.sources,
        "settings": job.settings,
        "left_out": {why: count for why, count in left_out.items() if count},
    }
    return _finish(job, fields)


def _finish(job: Job, fields: dict[str, Any]) -> Manifest:
    manifest = Manifest.model_validate(fields)
    write_atomically(job.out / m.MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())
    (job.out / m.JOURNAL).unlink()
    say(f"{job.out}:\n{report(manifest, job.left_out)}")
    return manifest


def _take(file: SourceFile, use: str) -> Input:
    try:
        stat, digest = file.path.stat(), file_digest(file.path)
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read: {error.strerror}") from None
    fields = {"name": file.name, "use": use, "kind": file.kind, "size": stat.st_size, "xxh3": digest}
    return Input(file, SourceInfo.model_validate(fields), stat.st_mtime_ns)
