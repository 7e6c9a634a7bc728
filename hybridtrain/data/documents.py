"""The documents of a source file, streamed: memory does not grow with the corpus."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from hybridtrain.data.cuts import PART_CHARS, Cuts, Part
from hybridtrain.data.sources import SourceFile
from hybridtrain.data.unpack import unpack
from hybridtrain.errors import DataError

MAX_LINE_BYTES = 128 << 20  # of JSONL: a line is held whole, several times over
_BOM = codecs.BOM_UTF8
_NAMES = 20  # of fields that a line has


@dataclass(frozen=True)
class Piece:
    """A part of a document, bounded where the text can be cut. The pieces of a document follow each other and
    concatenate to it.

    `first` marks the piece that opens a document; `position` is how many bytes of the source file have been
    read; `context` is the text before it that it is encoded behind.
    """

    text: str
    first: bool
    position: int
    context: str = ""


@dataclass
class Tally:
    """What reading a file leaves out."""

    blank_lines: int = 0


def read_pieces(
    file: SourceFile, text_field: str = "text", cuts: Cuts | None = None, tally: Tally | None = None
) -> Iterator[Piece]:
    """The documents of one file in pieces: those that `cuts` says encode as the whole text, or else of 65,536
    characters.

    `tally` receives what is left out. Raises DataError naming the file and the byte offset (in the
    decompressed text).
    """
    cut = split_chunks if cuts is None else cuts.parts
    try:
        raw = file.path.open("rb")
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read: {error.strerror}") from None
    with raw:
        blocks = unpack(raw, file.compression, file.name)
        lines = _jsonl_texts(file, blocks, text_field, tally or Tally())
        documents = [_text_chunks(file, blocks)] if file.kind == "text" else ([line] for line in lines)
        for document in documents:
            for number, part in enumerate(cut(document, file.name)):
                yield Piece(part.text, number == 0, raw.tell(), part.context)


def split_chunks(chunks: Iterable[str], source: str) -> Iterator[Part]:
    """The text that the chunks concatenate to, in parts of 65,536 characters at most, without a look at any
    tokenizer.
    """
    waiting = ""
    for chunk in chunks:
        *ready, waiting = split_text(waiting + chunk)
        yield from (Part("", text) for text in ready)
    yield Part("", waiting)


def split_text(text: str, limit: int = PART_CHARS) -> Iterator[str]:
    """`text` in pieces of at most `limit` characters that concatenate to it, cut between words where there
    are words.
    """
    low = 0
    while len(text) - low > limit:
        high = _cut(text, low + limit // 2, low + limit)
        yield text[low:high]
        low = high
    yield text[low:]


def _text_chunks(file: SourceFile, blocks: Iterator[bytes]) -> Iterator[str]:
    """One document: the whole file, decoded as it is read."""
    undecoded, offset, blank = b"", 0, True
    for block in blocks:
        data = undecoded + block
        text, used = _decode(file, data, offset, final=False)
        undecoded = data[used:]
        text = text.removeprefix("\ufeff") if offset == 0 else text
        offset += used
        blank = blank and not text.strip()
        yield text
    _decode(file, undecoded, offset, final=True)
    if blank:
        raise DataError(f"{file.name}: has no text, only white space")


def _jsonl_texts(file: SourceFile, blocks: Iterator[bytes], text_field: str, tally: Tally) -> Iterator[str]:
    """The text field of every line that is not blank."""
    offset = documents = 0
    for number, line in enumerate(_lines(file, blocks), start=1):
        if line.strip():
            yield _jsonl_text(file, line, number, offset, text_field)
            documents += 1
        else:
            tally.blank_lines += 1
        offset += len(line)
    if documents == 0:
        raise DataError(f"{file.name}: has no documents, only blank lines")


def _jsonl_text(file: SourceFile, line: bytes, number: int, offset: int, text_field: str) -> str:
    where = f"{file.name}:{number}"
    skipped = len(_BOM) if offset == 0 and line.startswith(_BOM) else 0
    text, _ = _decode(file, line[skipped:], offset + skipped, final=True)
    try:
        record, doubled = _parse(text, text_field)
    except json.JSONDecodeError as error:
        byte = offset + skipped + len(text[: error.pos].encode())
        raise DataError(f"{where}: is not JSON at byte {byte}: {error.msg}") from None
    except RecursionError:
        raise DataError(f"{where}: (byte {offset}) is nested too deeply to be read") from None
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{where}: (byte {offset}) cannot be read: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: (byte {offset}) is a JSON {type(record).__name__}, not an object")
    if text_field not in record:
        names = list(map(repr, record))
        present = ", ".join(names[:_NAMES]) + (", …" if len(names) > _NAMES else "") or "none"
        raise DataError(
            f"{where}: (byte {offset}) has no field {text_field!r}; its fields are {present} (--text-field), "
            "or data.text_field in settings"
        )
    if doubled:
        raise DataError(f"{where}: (byte {offset}) has the field {text_field!r} twice")
    value = record[text_field]
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{where}: (byte {offset}) field {text_field!r} is "
            f"{'empty' if isinstance(value, str) else 'not a string'}"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = f"\\u{ord(value[error.start]):04x}"
        raise DataError(
            f"{where}: (byte {offset}) field {text_field!r} has the lone surrogate {found}, which is not text"
        ) from None
    return value


def _parse(text: str, text_field: str) -> tuple[Any, bool]:
    """A line's JSON, and whether its outermost object has the text field more than once."""
    doubled = False

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal doubled  # the outermost object is built last
        record = dict(pairs)
        doubled = len(record) < len(pairs) and [name for name, _ in pairs].count(text_field) > 1
        return record

    return json.loads(text, object_pairs_hook=build), doubled


def _lines(file: SourceFile, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines with their line feeds, whatever the sizes of the blocks. Refuses one of more than
    MAX_LINE_BYTES.
    """
    parts: list[bytes] = []
    waiting, number = 0, 1
    for block in blocks:
        *whole, rest = block.split(b"\n")
        for line in whole:
            yield b"".join([*parts, line, b"\n"])
            parts, waiting, number = [], 0, number + 1
        parts.append(rest)
        waiting += len(rest)
        if waiting > MAX_LINE_BYTES:
            raise DataError(
                f"{file.name}:{number}: is longer than {MAX_LINE_BYTES:,} bytes, the most that a line may "
                "have; cut the document, or make it a .txt file"
            )
    if waiting:
        yield b"".join(parts)


def _decode(file: SourceFile, data: bytes, offset: int, final: bool) -> tuple[str, int]:
    try:
        return codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        _refuse_bytes(file, data, offset, error)


def _refuse_bytes(file: SourceFile, data: bytes, offset: int, error: UnicodeDecodeError) -> NoReturn:
    byte = data[error.start]
    raise DataError(
        f"{file.name}: is not UTF-8 at byte {offset + error.start} (0x{byte:02x}: {error.reason})"
    ) from None


def _cut(text: str, low: int, high: int) -> int:
    """Where to end a piece, after `low` and at `high` at the latest.

    Best is before a space that follows a letter or digit (no usual pre-tokenizer joins these), else before
    any white space, else at `high`.
    """
    cut = text.rfind(" ", low + 1, high)
    while cut > 0 and not text[cut - 1].isalnum():
        cut = text.rfind(" ", low + 1, cut)
    if cut > 0:
        return cut
    return next(
        (i for i in range(high - 1, low, -1) if text[i].isspace() and not text[i - 1].isspace()), high
    )
