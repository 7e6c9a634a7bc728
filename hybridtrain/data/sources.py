"""Documents from text sources, streamed: memory does not grow with the corpus.

A source is a file, a folder (searched recursively, in sorted order, links followed) or `shipped:NAME`. A
`.txt` file is one document; a `.jsonl` or `.ndjson` file has one document a line; each may also be compressed
(`.gz`, `.xz`, `.bz2`). Suffixes may be in upper case. Every file is read once; what is left out is listed
with its reason.
"""

from __future__ import annotations

import codecs
import errno
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from hybridtrain.data.cuts import PART_CHARS, Cuts, Part
from hybridtrain.data.unpack import COMPRESSIONS, unpack
from hybridtrain.errors import DataError

KINDS = {".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl"}
SHIPPED_PREFIX = "shipped:"
MAX_LINE_BYTES = 128 << 20  # of JSONL: a line is held whole, several times over
_CORPUS_SUFFIX = ".jsonl.xz"
_CORPUS = Path(__file__).parent / "corpus"
_BOM = codecs.BOM_UTF8
_AGAIN, _BROKEN, _NO_FILE = "named or linked more than once", "broken link", "no regular file"
_UNKNOWN, _EMPTY, _HIDDEN, _MISSING = "unknown suffix", "empty (0 bytes)", "hidden", "missing"
_EXAMPLES = 5  # of what is left out for one reason
_NAMES = 20  # of fields that a line has


@dataclass(frozen=True)
class SourceFile:
    """One file to read; `name` is what messages call it, `kind` is "text" or "jsonl", `compression` "" or a
    suffix.
    """

    name: str
    path: Path
    kind: str
    compression: str


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


class LeftOut(NamedTuple):
    """A file or folder that is not read: its name, and why."""

    name: str
    why: str


class Listing(NamedTuple):
    """The files of the corpus and of the validation text, each in the order in which they are read; and what
    is left out.
    """

    corpus: list[SourceFile]
    held_out: list[SourceFile]
    left_out: list[LeftOut]


@dataclass
class Tally:
    """What reading a file leaves out."""

    blank_lines: int = 0


def shipped_names() -> list[str]:
    """The corpora that come with the package, as sources: ["shipped:sotu"]."""
    return sorted(
        SHIPPED_PREFIX + path.name.removesuffix(_CORPUS_SUFFIX) for path in _CORPUS.glob("*" + _CORPUS_SUFFIX)
    )


def list_files(sources: Sequence[str | Path], held_out: Sequence[str | Path] = ()) -> Listing:
    """The files behind the sources of the corpus and of the validation text; each file once, however often it
    is named.

    Raises DataError listing every source that is missing, unreadable, empty, of an unknown suffix, or in
    both.
    """
    problems: list[str] = []
    left_out: list[LeftOut] = []
    groups = _Group({}, left_out, problems), _Group({}, left_out, problems)
    for group, names in zip(groups, (sources, held_out), strict=True):
        for source in names:
            group.add(str(source))
    if not sources:
        problems.append(f"no source is given; name files, folders or {', '.join(shipped_names())}")
    both = [file.name for key, file in groups[1].files.items() if key in groups[0].files]
    problems += [
        f"{name}: is both in the corpus and in the validation text; leave it out of one" for name in both
    ]
    if problems:
        raise DataError("\n".join([f"sources: {len(problems)} problem(s)", *(f"  {p}" for p in problems)]))
    return Listing(list(groups[0].files.values()), list(groups[1].files.values()), left_out)


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


@dataclass
class _Group:
    """The files found so far, by device and inode; shared lists of what is left out and of what is wrong."""

    files: dict[tuple[int, int], SourceFile]
    left_out: list[LeftOut]
    problems: list[str]

    def add(self, source: str) -> None:
        """Append the files of one source, or what is wrong with it."""
        path = Path(source)
        if source.startswith(SHIPPED_PREFIX):
            path = _CORPUS / (source.removeprefix(SHIPPED_PREFIX) + _CORPUS_SUFFIX)
            if source not in shipped_names():
                self.problems.append(
                    f"{source}: no such corpus is shipped; there is {', '.join(shipped_names())}"
                )
                return
        try:
            if path.is_dir():
                self._add_folder(path)
            elif why := self._take(source, path):
                if why == _AGAIN:
                    self.left_out.append(LeftOut(source, why))
                else:
                    words = {
                        _MISSING: "no such file or folder",
                        _UNKNOWN: f"unknown suffix; legal are {_legal()}",
                    }
                    self.problems.append(f"{source}: {words.get(why, f'is {why}')}")
        except OSError as error:
            self.problems.append(f"{error.filename or source}: cannot be read: {error.strerror}")

    def _take(self, name: str, path: Path) -> str:
        """Take a file up, or say why not."""
        try:
            found = path.stat()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                raise
            return _BROKEN if path.is_symlink() else _MISSING
        if not stat.S_ISREG(found.st_mode):
            return _NO_FILE
        suffixes = _suffixes(path)
        if suffixes is None:
            return _UNKNOWN
        if found.st_size == 0:
            return _EMPTY
        if (key := (found.st_dev, found.st_ino)) in self.files:
            return _AGAIN
        self.files[key] = SourceFile(name, path, *suffixes)
        return ""

    def _add_folder(self, folder: Path) -> None:
        before = len(self.files)
        left: list[LeftOut] = []
        for path in sorted(_walk(folder, left)):
            hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            if why := _HIDDEN if hidden else self._take(str(path), path):
                left.append(LeftOut(str(path), why))
        self.left_out += left
        if len(self.files) == before and not any(entry.why == _AGAIN for entry in left):
            self.problems.append(
                f"{folder}: no file in this folder ends in {_legal()} and can be "
                f"read{summary(left, '; left out: ')}"
            )


def summary(left_out: Sequence[LeftOut], before: str = "") -> str:
    """What is left out in a line: "3 files: 2 unknown suffix (.md, .pdf), 1 empty (a.txt)"; "" where nothing
    is.
    """
    if not left_out:
        return ""
    parts = []
    for why in dict.fromkeys(entry.why for entry in left_out):
        names = [entry.name for entry in left_out if entry.why == why]
        examples = list(
            dict.fromkeys(
                "".join(Path(name).suffixes[-1:]) or Path(name).name if why == _UNKNOWN else name
                for name in names
            )
        )
        parts.append(
            f"{len(names):,} {why} "
            f"({', '.join(examples[:_EXAMPLES])}{', …' if len(examples) > _EXAMPLES else ''})"
        )
    return f"{before}{len(left_out):,} file{'s' * (len(left_out) > 1)}: {', '.join(parts)}"


def _walk(folder: Path, left: list[LeftOut]) -> Iterator[Path]:
    """Every path below a folder that is no folder, links followed; a folder is walked once. OSError where one
    cannot be listed.
    """

    def refuse(error: OSError) -> NoReturn:
        raise error

    top = folder.stat()
    seen = {(top.st_dev, top.st_ino)}
    for place, names, files in os.walk(folder, followlinks=True, onerror=refuse):
        kept = []
        # of two names of a folder the one that is neither hidden nor a link is taken
        for name in sorted(
            names, key=lambda name: (name.startswith("."), os.path.islink(os.path.join(place, name)), name)
        ):
            found = os.stat(os.path.join(place, name))
            if (key := (found.st_dev, found.st_ino)) in seen:
                left.append(LeftOut(os.path.join(place, name), _AGAIN))
            else:
                seen.add(key)
                kept.append(name)
        names[:] = kept
        yield from (Path(place, name) for name in files)


def _suffixes(path: Path) -> tuple[str, str] | None:
    """(kind, compression) by the file's name, or None."""
    suffix = path.suffix.lower()
    compression = suffix if suffix in COMPRESSIONS else ""
    kind = KINDS.get(Path(path.stem).suffix.lower() if compression else suffix)
    return None if kind is None else (kind, compression)


def _legal() -> str:
    return f"{', '.join(KINDS)}, each also with {', '.join(COMPRESSIONS)}"


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
            f"{where}: (byte {offset}) field {text_field!r} has the lone surrogate {found}, which is no text"
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
