"""Files that somebody else may have made: read within bounds, looked at before they are used, never run.

docs/security.md says which files these are. JSON is read by `read_json`, paths that a file names are resolved
by `inside`.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import tomllib
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from hybridtrain.errors import UserError

MAX_BYTES = 64 << 20  # of a JSON file: the index of a million tensors
MAX_TOML = 1 << 20  # of settings
MAX_DEPTH = 64  # of lists and objects in each other
_SHOWN = 20  # problems that one message lists

T = TypeVar("T")


class UntrustedFileError(UserError):
    """A file that was not made here is damaged, too large, or not of the shape that it should have."""


def read_bytes(path: Path, most: int = MAX_BYTES) -> bytes:
    """The content of `path`. Raises FileNotFoundError, OSError, and UntrustedFileError where it is longer
    than `most` bytes.

    Links are followed; a pipe or device, whose reading may never end, is refused.
    """
    if _may_never_end(path):
        raise UntrustedFileError(f"{path}: is not a regular file")
    with path.open("rb") as stream:
        content: bytes = stream.read(most + 1)
    if len(content) > most:
        raise UntrustedFileError(
            f"{path}: is longer than {most:,} bytes, the most that is read of such a file"
        )
    return content


def open_regular(path: Path) -> IO[bytes]:
    """The file or object `path`, to read. Raises OSError, also for a pipe or device, whose reading may never
    end.
    """
    if _may_never_end(path):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return path.open("rb")


def read_json(path: Path, shape: type[T], most: int = MAX_BYTES) -> T:
    """The JSON file `path` as a value of the type `shape`: a pydantic model, or a type such as `dict[str,
    Any]`.

    Raises as `read_bytes` and `parse_json`.
    """
    return parse_json(read_bytes(path, most), str(path), shape)


def parse_json(content: bytes | str, source: str, shape: type[T]) -> T:
    """JSON text as a value of the type `shape`, without conversions between types ("1" is not a number).

    Raises UntrustedFileError, naming `source`, where it is not UTF-8 or not JSON, nested deeper than
    MAX_DEPTH, has a key twice, or where a value is of another type, then listing all of them.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        value = json.loads(text, object_pairs_hook=_without_doubles)
    except RecursionError:
        raise UntrustedFileError(f"{source}: is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # not UTF-8, not JSON, a key twice, a number of thousands of digits
        raise UntrustedFileError(f"{source}: is not JSON: {error}") from None
    if _deeper_than(value, MAX_DEPTH):
        raise UntrustedFileError(f"{source}: is nested deeper than {MAX_DEPTH} levels")
    return validated(value, source, shape)


def read_toml(path: Path, most: int = MAX_TOML) -> dict[str, Any]:
    """The TOML file `path`. Raises OSError, and UntrustedFileError where it is longer than `most`, nested
    deeply or no TOML.
    """
    content = read_bytes(path, most)
    try:
        tree = tomllib.loads(content.decode("utf-8"))
    except RecursionError:
        raise UntrustedFileError(f"{path}: is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # not UTF-8, not TOML, a number of thousands of digits
        raise UntrustedFileError(f"{path}: is not TOML: {error}") from None
    if _deeper_than(tree, MAX_DEPTH):
        raise UntrustedFileError(f"{path}: is nested deeper than {MAX_DEPTH} levels")
    return tree


def validated(value: Any, source: str, shape: type[T]) -> T:
    """A parsed value as one of the type `shape`. Raises UntrustedFileError listing every place where it has
    another type.
    """
    try:
        return TypeAdapter(shape).validate_python(value, strict=True)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, e['loc'])) or 'the whole'}: {e['msg']}"
            for e in error.errors(include_url=False)
        ]
        lines = [f"  {problem}" for problem in first_of(problems)]
        raise UntrustedFileError("\n".join([f"{source}: is not what it should be", *lines])) from None


def first_of(problems: list[str]) -> list[str]:
    """As many problems as one message lists, and a line that counts the others."""
    return problems if len(problems) <= _SHOWN else [*problems[:_SHOWN], f"and {len(problems) - _SHOWN} more"]


def inside(folder: Path, name: str, source: str) -> Path:
    """The file `name` of `folder`, as `source` calls it. Raises UntrustedFileError where it would lie outside
    of the folder.
    """
    parts = name.replace("\\", "/").split("/")
    encodable = (
        name.encode("utf-8", "ignore").decode("utf-8") == name
    )  # JSON has halves of characters, file names not
    if (
        not name
        or not encodable
        or "\0" in name
        or name.startswith(("/", "\\"))
        or ".." in parts
        or ":" in parts[0]
    ):
        raise UntrustedFileError(f"{source}: names the file {name!r}, which is not one below {folder}")
    return folder / name


def _may_never_end(path: Path) -> bool:
    """Whether reading it may: a pipe or device of this machine. Links are followed."""
    return isinstance(path, Path) and not (stat.S_ISREG(mode := os.stat(path).st_mode) or stat.S_ISDIR(mode))


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return value


def _deeper_than(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most + 1):
        level = [
            v for c in level if isinstance(c, dict | list) for v in (c.values() if isinstance(c, dict) else c)
        ]
        if not level:
            return False
    return True
