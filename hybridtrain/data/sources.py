"""Documents from text sources, streamed: memory does not grow with the corpus.

A source is a file, a folder (searched recursively, in sorted order) or `shipped:NAME`. A `.txt` file is one document; a
`.jsonl` or `.ndjson` file has one document a line; each may also be compressed (`.gz`, `.xz`, `.bz2`).
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import xxhash

from hybridtrain.errors import DataError

KINDS = {".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl"}
SHIPPED_PREFIX = "shipped:"
_CORPUS_SUFFIX = ".jsonl.xz"
_CORPUS = Path(__file__).parent / "corpus"
_PIECE_CHARS = 1 << 16
_READ_BYTES = 1 << 20
_BOM = codecs.BOM_UTF8
_DECOMPRESSORS: dict[str, Callable[[IO[bytes]], Any]] = {
    "": lambda raw: raw,
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".xz": lzma.LZMAFile,
    ".bz2": bz2.BZ2File,
}
COMPRESSIONS = tuple(_DECOMPRESSORS)[1:]


@dataclass(frozen=True)
class SourceFile:
    """One file to read; `name` is what messages call it, `kind` is "text" or "jsonl", `compression` "" or a suffix."""

    name: str
    path: Path
    kind: str
    compression: str


@dataclass(frozen=True)
class Piece:
    """A bounded part of a document. The pieces of a document follow each other and concatenate to its text.

    `first` marks the piece that opens a document; `position` is how many bytes of the source file have been read.
    """

    text: str
    first: bool
    position: int


def shipped_names() -> list[str]:
    """The corpora that come with the package, as sources: ["shipped:sotu"]."""
    return sorted(SHIPPED_PREFIX + path.name.removesuffix(_CORPUS_SUFFIX) for path in _CORPUS.glob("*" + _CORPUS_SUFFIX))


def list_files(sources: Sequence[str | Path], held_out: Sequence[str | Path] = ()) -> tuple[list[SourceFile], list[SourceFile]]:
    """The files behind the sources of the corpus and of the validation text, each in order.

    Raises DataError listing every source that is missing, empty, of an unknown suffix, or in both.
    """
    problems: list[str] = []
    groups: tuple[list[SourceFile], list[SourceFile]] = ([], [])
    for group, names in zip(groups, (sources, held_out), strict=True):
        for source in names:
            _expand(str(source), group, problems)
    if not sources:
        problems.append(f"no source is given; name files, folders or {', '.join(shipped_names())}")
    corpus = {file.path.resolve() for file in groups[0]}
    both = [file.name for file in groups[1] if file.path.resolve() in corpus]
    problems += [f"{name}: is both in the corpus and in the validation text; leave it out of one" for name in both]
    if problems:
        raise DataError("\n".join([f"sources: {len(problems)} problem(s)", *(f"  {p}" for p in problems)]))
    return groups


def file_digest(path: Path) -> str:
    """The xxh3 (128 bits, hex) of a file's bytes; OSError where it cannot be read."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def read_pieces(file: SourceFile, text_field: str = "text") -> Iterator[Piece]:
    """The documents of one file as pieces of at most 65,536 characters, cut between words where there are words.

    Such a cut falls between two pre-tokens of the usual byte-level tokenizers, so encoding piece by piece gives the ids of
    the whole text. Raises DataError naming the file and the byte offset (in the decompressed text).
    """
    try:
        raw = file.path.open("rb")
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read: {error.strerror}") from None
    with raw:
        blocks = _blocks(file, raw)
        if file.kind == "text":
            yield from _text_pieces(file, blocks, raw)
            return
        for line in _jsonl_texts(file, blocks, text_field):
            for number, piece in enumerate(split_text(line)):
                yield Piece(piece, number == 0, raw.tell())


def split_text(text: str, limit: int = _PIECE_CHARS) -> Iterator[str]:
    """`text` in pieces of at most `limit` characters that concatenate to it."""
    low = 0
    while len(text) - low > limit:
        high = _cut(text, low + limit // 2, low + limit)
        yield text[low:high]
        low = high
    yield text[low:]


def _expand(source: str, files: list[SourceFile], problems: list[str]) -> None:
    """Append the files of one source, or what is wrong with it."""
    path = Path(source)
    if source.startswith(SHIPPED_PREFIX):
        path = _CORPUS / (source.removeprefix(SHIPPED_PREFIX) + _CORPUS_SUFFIX)
        if source not in shipped_names():
            problems.append(f"{source}: no such corpus is shipped; there is {', '.join(shipped_names())}")
            return
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file() and _suffixes(p) is not None)
        if not inside:
            problems.append(f"{source}: no file in this folder ends in {_legal()}")
        for child in inside:
            _expand(str(child), files, problems)
        return
    suffixes = _suffixes(path)
    if not path.exists():
        problems.append(f"{source}: no such file or folder")
    elif suffixes is None:
        problems.append(f"{source}: unknown suffix; legal are {_legal()}")
    elif path.stat().st_size == 0:
        problems.append(f"{source}: is empty (0 bytes)")
    else:
        files.append(SourceFile(source, path, *suffixes))


def _suffixes(path: Path) -> tuple[str, str] | None:
    """(kind, compression) by the file's name, or None."""
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    kind = KINDS.get(Path(path.stem).suffix if compression else path.suffix)
    return None if kind is None else (kind, compression)


def _legal() -> str:
    return f"{', '.join(KINDS)}, each also with {', '.join(COMPRESSIONS)}"


def _blocks(file: SourceFile, raw: IO[bytes]) -> Iterator[bytes]:
    """The decompressed bytes of a file in blocks, without a byte-order mark; refuses damaged streams and empty ones."""
    stream = _DECOMPRESSORS[file.compression](raw)
    offset = 0
    while True:
        try:
            block = stream.read1(_READ_BYTES)
        except EOFError:
            raise DataError(f"{file.name}: the {file.compression} stream is truncated; its text ends at byte {offset}") from None
        except (OSError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"{file.name}: cannot be read beyond byte {offset} of its text: {error}") from None
        if not block:
            break
        yield block
        offset += len(block)
    if offset == 0:
        raise DataError(f"{file.name}: is empty (0 bytes of text)")


def _text_pieces(file: SourceFile, blocks: Iterator[bytes], raw: IO[bytes]) -> Iterator[Piece]:
    """One document: the whole file, decoded as it is read."""
    waiting, undecoded, offset = "", b"", 0
    first, blank = True, True
    for block in blocks:
        data = undecoded + block
        text, used = _decode(file, data, offset, final=False)
        undecoded = data[used:]
        waiting += text.removeprefix("\ufeff") if offset == 0 else text
        offset += used
        if len(waiting) > _PIECE_CHARS:
            *ready, waiting = split_text(waiting)
            for piece in ready:
                blank = blank and not piece.strip()
                yield Piece(piece, first, raw.tell())
                first = False
    _decode(file, undecoded, offset, final=True)
    if blank and not waiting.strip():
        raise DataError(f"{file.name}: has no text, only white space")
    yield Piece(waiting, first, raw.tell())


def _jsonl_texts(file: SourceFile, blocks: Iterator[bytes], text_field: str) -> Iterator[str]:
    """The text field of every line that is not blank."""
    offset = documents = 0
    for number, line in enumerate(_lines(blocks), start=1):
        if line.strip():
            yield _jsonl_text(file, line, number, offset, text_field)
            documents += 1
        offset += len(line)
    if documents == 0:
        raise DataError(f"{file.name}: has no documents, only blank lines")


def _jsonl_text(file: SourceFile, line: bytes, number: int, offset: int, text_field: str) -> str:
    where = f"{file.name}:{number}"
    skipped = len(_BOM) if offset == 0 and line.startswith(_BOM) else 0
    text, _ = _decode(file, line[skipped:], offset + skipped, final=True)
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        byte = offset + skipped + len(text[: error.pos].encode())
        raise DataError(f"{where}: is not JSON at byte {byte}: {error.msg}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: (byte {offset}) is a JSON {type(record).__name__}, not an object")
    if text_field not in record:
        present = ", ".join(map(repr, record)) or "none"
        raise DataError(f"{where}: (byte {offset}) has no field {text_field!r}; its fields are {present} (--text-field)")
    value = record[text_field]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: (byte {offset}) field {text_field!r} is {'empty' if isinstance(value, str) else 'not a string'}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = f"\\u{ord(value[error.start]):04x}"
        raise DataError(f"{where}: (byte {offset}) field {text_field!r} has the lone surrogate {found}, which is no text") from None
    return value


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines with their line feeds, whatever the sizes of the blocks."""
    parts: list[bytes] = []
    for block in blocks:
        *whole, rest = block.split(b"\n")
        for line in whole:
            yield b"".join([*parts, line, b"\n"])
            parts = []
        parts.append(rest)
    if any(parts):
        yield b"".join(parts)


def _decode(file: SourceFile, data: bytes, offset: int, final: bool) -> tuple[str, int]:
    try:
        return codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        _refuse_bytes(file, data, offset, error)


def _refuse_bytes(file: SourceFile, data: bytes, offset: int, error: UnicodeDecodeError) -> NoReturn:
    byte = data[error.start]
    raise DataError(f"{file.name}: is not UTF-8 at byte {offset + error.start} (0x{byte:02x}: {error.reason})") from None


def _cut(text: str, low: int, high: int) -> int:
    """Where to end a piece, after `low` and at `high` at the latest.

    Best is before a space that follows a letter or digit (no usual pre-tokenizer joins these), else before any white
    space, else at `high`.
    """
    cut = text.rfind(" ", low + 1, high)
    while cut > 0 and not text[cut - 1].isalnum():
        cut = text.rfind(" ", low + 1, cut)
    if cut > 0:
        return cut
    return next((i for i in range(high - 1, low, -1) if text[i].isspace() and not text[i - 1].isspace()), high)
