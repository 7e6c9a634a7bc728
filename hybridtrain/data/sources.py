"""The files behind the sources of a corpus: which are read, in which order, and what is left out and why.

A source is a file, a folder (searched recursively, in sorted order, links followed) or `shipped:NAME`. A
`.txt` file is one document; a `.jsonl` or `.ndjson` file has one document a line; each may also be compressed
(`.gz`, `.xz`, `.bz2`). Suffixes may be in upper case. Every file is read once.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

from hybridtrain.data.unpack import COMPRESSIONS
from hybridtrain.errors import DataError

SourceKind = Literal["text", "jsonl"]
KINDS: dict[str, SourceKind] = {".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl"}
SHIPPED_PREFIX = "shipped:"
_CORPUS_SUFFIX = ".jsonl.xz"
_CORPUS = Path(__file__).parent / "corpus"
_AGAIN, _BROKEN, _NO_FILE = "named or linked more than once", "broken link", "not a regular file"
_UNKNOWN, _EMPTY, _HIDDEN, _MISSING = "unknown suffix", "empty (0 bytes)", "hidden", "missing"
_EXAMPLES = 5  # of what is left out for one reason


@dataclass(frozen=True)
class SourceFile:
    """One file to read; `name` is what messages call it, `kind` is "text" or "jsonl", `compression` "" or a
    suffix.
    """

    name: str
    path: Path
    kind: SourceKind
    compression: str


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
        """Add a file, or note why it is left out."""
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
    """The files that are left out, in one line: "3 files: 2 unknown suffix (.md, .pdf), 1 empty (a.txt)"; ""
    where nothing is.
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
    """Every path below a folder but for folders, links followed; a folder is walked once. OSError where one
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


def _suffixes(path: Path) -> tuple[SourceKind, str] | None:
    """(kind, compression) by the file's name, or None."""
    suffix = path.suffix.lower()
    compression = suffix if suffix in COMPRESSIONS else ""
    kind = KINDS.get(Path(path.stem).suffix.lower() if compression else suffix)
    return None if kind is None else (kind, compression)


def _legal() -> str:
    return f"{', '.join(KINDS)}, each also with {', '.join(COMPRESSIONS)}"
