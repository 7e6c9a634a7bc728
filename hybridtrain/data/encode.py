"""Texts to tokens: the loop that reads, encodes and appends, with a commit now and then."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer

from hybridtrain.data.holdout import Holdout
from hybridtrain.data.journal import Job, Journal, write_journal
from hybridtrain.data.manifest import SplitName
from hybridtrain.data.progress import EncodingProgress, say
from hybridtrain.data.sources import Piece, read_pieces
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


def encode_files(
    job: Job,
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
                write_journal(job.out, journal.model_copy(update=position | states))
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
