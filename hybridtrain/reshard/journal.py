"""What a reshard has done so far, so that one that was killed goes on: a line of JSON for each finished
segment.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

from pydantic import BeforeValidator
from torch.distributed.checkpoint.filesystem import _StorageInfo
from typing_extensions import TypedDict

from hybridtrain.checkpoint.files import Records
from hybridtrain.errors import UserError
from hybridtrain.files.durable import sync_file
from hybridtrain.files.lock import NAME as LOCK
from hybridtrain.files.untrusted import UntrustedFileError, parse_json

NAME = "reshard.jsonl"


@dataclass(frozen=True)
class WrittenChunk:
    """`sizes` elements from `offsets` on of the tensor `name`: `length` bytes of `file` from `start` on."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int

    @property
    def place(self) -> _StorageInfo:
        """Where it lies, as torch's index says it."""
        return _StorageInfo(self.file, self.start, self.length)


def _to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class _Record(TypedDict):
    size: int
    xxh3: str


class _Line(TypedDict):
    segment: int
    files: dict[str, _Record]
    pieces: list[
        Annotated[tuple[str, list[int], list[int], str, int, int], BeforeValidator(_to_tuple)]
    ]  # JSON has no tuples
    blocks: dict[str, str]


@dataclass(frozen=True)
class Segment:
    """What a finished segment left: its files and the chunks in them, and the xxh3s of its tensors' blocks,
    by name.
    """

    number: int
    files: Records = field(default_factory=dict)
    chunks: list[WrittenChunk] = field(default_factory=list)
    blocks: dict[str, bytes] = field(default_factory=dict)

    def to_json(self) -> str:
        tree = {
            "segment": self.number,
            "files": self.files,
            "pieces": [list(asdict(chunk).values()) for chunk in self.chunks],
            "blocks": {name: blocks.hex() for name, blocks in self.blocks.items()},
        }
        return json.dumps(tree, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Segment:
        tree = parse_json(line, "it", _Line)
        chunks = [
            WrittenChunk(name, tuple(offsets), tuple(sizes), file, start, length)
            for name, offsets, sizes, file, start, length in tree["pieces"]
        ]
        files = {name: dict(record) for name, record in tree["files"].items()}
        return cls(
            tree["segment"],
            files,
            chunks,
            {name: bytes.fromhex(text) for name, text in tree["blocks"].items()},
        )


class Journal:
    """The journal in the folder `out`, whose lock is held while it is open; `done` are the finished segments.

    `job` describes the reshard and is the first line. Raises UserError where `out` holds anything but the
    same job, unfinished.
    """

    def __init__(self, out: Path, job: dict[str, Any]) -> None:
        self.path = out / NAME
        if (
            not self.path.exists()
            and out.exists()
            and (not out.is_dir() or any(not path.name.startswith(LOCK) for path in out.iterdir()))
        ):
            raise UserError(f"{out} exists and is not empty; choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        self.done = self._read(json.loads(json.dumps(job)))

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, segment: Segment) -> None:
        """Note a finished segment, durably."""
        self._write(segment.to_json())
        self.done.append(segment)

    def remove(self) -> None:
        self.path.unlink()

    def _read(self, job: dict[str, Any]) -> list[Segment]:
        self._file.seek(0)
        text = self._file.read().decode(errors="replace")
        whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last line
        self._file.truncate(len(whole.encode()))
        first, *rest = whole.splitlines() or [""]
        try:
            same = bool(first) and parse_json(first, "it", dict[str, Any]) == job
            done = [Segment.from_json(line) for line in rest] if same else []
        except (UntrustedFileError, ValueError) as error:
            raise UserError(
                f"{self.path}: is damaged: {error}; remove {self.path.parent} and start anew"
            ) from None
        if not rest and not same:  # nothing was done
            self._file.truncate(0)
            self._write(json.dumps(job))
            return []
        if not same:
            raise UserError(
                f"{self.path.parent} holds an unfinished reshard of something else, or with other arguments; "
                "repeat those, or remove the folder"
            )
        return done

    def _write(self, line: str) -> None:
        self._file.write(line.encode() + b"\n")
        sync_file(self._file)
