"""Texts to tokens: the loop that reads, encodes and appends, with a commit now and then."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer

from hybridtrain.console import say
from hybridtrain.data.cuts import Cuts
from hybridtrain.data.documents import Piece, Tally, read_pieces
from hybridtrain.data.holdout import Holdout
from hybridtrain.data.journal import Job, Journal, write_journal
from hybridtrain.data.manifest import SplitName
from hybridtrain.data.progress import EncodingProgress
from hybridtrain.data.tokenizer import library_errors
from hybridtrain.data.writer import SplitWriter
from hybridtrain.errors import DataError

TOKENIZER_TRAINING_CHARS = 1 << 30
_COMMIT_BYTES = 64 << 20
_BATCH_CHARS = 2 << 20


def corpus_documents(job: Job) -> Iterator[Piece]:
    """The first piece of every document of the corpus."""
    for entry in job.inputs:
        if entry.info.use == "corpus":
            yield from (piece for piece in read_pieces(entry.file, job.settings.text_field) if piece.first)


def training_texts(job: Job, holdout: Holdout) -> Iterator[str]:
    """The training documents in order, up to TOKENIZER_TRAINING_CHARS."""
    documents, chars = 0, 0
    for entry in job.inputs:
        for piece in read_pieces(entry.file, job.settings.text_field):
            documents += piece.first
            if entry.info.use == "validation" or holdout.is_validation(documents - 1):
                continue
            if chars >= TOKENIZER_TRAINING_CHARS:
                say(f"the tokenizer is trained on the first {chars:,} characters of the corpus")
                return
            chars += len(piece.text)
            yield piece.text


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, and the token that it writes before each document."""

    tokenizer: Tokenizer
    separator_id: int


def encode_files(
    job: Job,
    journal: Journal,
    holdout: Holdout,
    encoder: Encoder,
    writers: dict[SplitName, SplitWriter],
    bar: EncodingProgress,
) -> int:
    """Append the pieces after the journal's position to the writers, with a commit after every shard and 64
    MiB of text.

    Returns how many blank lines were left out.
    """
    documents, uncommitted, blank_lines = journal.documents, 0, journal.blank_lines
    cuts = Cuts(encoder.tokenizer)
    for number in range(journal.file, len(job.inputs)):
        entry = job.inputs[number]
        done = journal.pieces if number == journal.file else 0
        tally = Tally()
        pieces = read_pieces(entry.file, job.settings.text_field, cuts, tally)
        for _ in range(done):
            next(pieces)
        for piece, ids in _encoded(encoder.tokenizer, pieces):
            if encoder.separator_id in ids:
                raise DataError(
                    f"{entry.file.name}: document {documents + piece.first:,} of all has the separator in "
                    "its text"
                )
            documents += piece.first
            held_out = entry.info.use == "validation" or holdout.is_validation(documents - 1)
            size = len(piece.text.encode())
            full = writers["validation" if held_out else "train"].append(
                [encoder.separator_id] * piece.first + ids, piece.first, size
            )
            done += 1
            uncommitted += size
            bar.advance(piece, size)
            if full or uncommitted >= _COMMIT_BYTES:
                states = {split: writer.commit() for split, writer in writers.items()}
                position = {
                    "file": number,
                    "pieces": done,
                    "documents": documents,
                    "blank_lines": blank_lines,
                }
                write_journal(job.out, journal.model_copy(update=position | states))
                uncommitted = 0
        bar.finish_file(entry.info.size)
        blank_lines += tally.blank_lines
        stat = entry.file.path.stat()
        if (stat.st_size, stat.st_mtime_ns) != (entry.info.size, entry.mtime_ns):
            raise DataError(f"{entry.file.name}: changed while it was read; run the command again")
    return blank_lines


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
    """The ids of the pieces' own text: those of what they are encoded behind are taken off."""
    later = [number for number, piece in enumerate(batch) if piece.context]
    texts = [piece.context + piece.text for piece in batch] + [batch[number].context for number in later]
    with library_errors("the tokenizer fails on a text"):
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    before = {number: encoding.ids for number, encoding in zip(later, encodings[len(batch) :], strict=True)}
    for number, piece in enumerate(batch):
        ids, known = encodings[number].ids, before.get(number, [])
        if ids[: len(known)] != known:
            raise DataError(
                f"the tokenizer encodes {piece.context[-20:]!r} differently before {piece.text[:20]!r}; cut "
                "the document"
            )
        yield piece, ids[len(known) :]
