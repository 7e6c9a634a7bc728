"""Writes the shards of one split so that an interrupted preparation goes on from its last commit, byte for
byte.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict

from hybridtrain.data.manifest import Count, ShardInfo, SplitInfo, SplitName
from hybridtrain.files.durable import file_digest, sync_file, sync_folder

_SUFFIXES = (".tokens", ".starts")
_PART = ".part"


class WriterState(BaseModel):
    """The state of a split at a commit: its finished shards, and the lengths of the open one (in entries)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: tuple[ShardInfo, ...] = ()
    open_tokens: Count = 0
    open_documents: Count = 0
    bytes: Count = 0


class StaleStateError(Exception):
    """The files do not agree with the state; the preparation must start over."""


class SplitWriter:
    """Appends documents to `SPLIT-NNNNN.tokens` and `.starts`; a shard ends with the piece that fills it.

    An unfinished shard is called `NAME.part`. Raises StaleStateError where the files do not continue `state`.
    """

    def __init__(
        self, folder: Path, split: SplitName, dtype: str, shard_tokens: int, state: WriterState
    ) -> None:
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._token_type = np.dtype(dtype).newbyteorder("<")
        self._shards = list(state.shards)
        self._bytes = state.bytes
        self._check_finished()
        self._delete_later_files(keep_open=state.open_tokens > 0)
        self._open(state.open_tokens, state.open_documents)

    def append(self, ids: Sequence[int], starts: bool, num_bytes: int) -> bool:
        """Add tokens, the first of which starts a document where `starts`; True where that finished a
        shard.
        """
        if starts:
            self._write(1, np.array([self._tokens], "<i8").tobytes())
            self._documents += 1
        self._write(0, np.asarray(ids, self._token_type).tobytes())
        self._tokens += len(ids)
        self._bytes += num_bytes
        if self._tokens < self._shard_tokens:
            return False
        self._finish_shard()
        self._open(0, 0)
        return True

    def commit(self) -> WriterState:
        """Make everything appended so far durable, and say where this split stands."""
        for stream in self._streams:
            sync_file(stream)
        return WriterState(
            shards=tuple(self._shards),
            open_tokens=self._tokens,
            open_documents=self._documents,
            bytes=self._bytes,
        )

    def finish(self) -> SplitInfo:
        """Close the last shard (or drop it where it is empty) and describe the split."""
        if self._tokens:
            self._finish_shard()
        else:
            self.close()
            for path in self._paths(_PART):
                path.unlink()
        return SplitInfo(
            tokens=sum(shard.tokens for shard in self._shards),
            documents=sum(shard.documents for shard in self._shards),
            bytes=self._bytes,
            shards=tuple(self._shards),
        )

    def close(self) -> None:
        """Let go of the files; what was not committed may be lost."""
        for stream in self._streams:
            stream.close()

    def _write(self, which: int, content: bytes) -> None:
        self._streams[which].write(content)
        self._digests[which].update(content)

    def _name(self) -> str:
        return f"{self._split}-{len(self._shards):05d}"

    def _paths(self, part: str = "") -> list[Path]:
        return [self._folder / (self._name() + suffix + part) for suffix in _SUFFIXES]

    def _finish_shard(self) -> None:
        self.commit()
        self.close()
        for part, final in zip(self._paths(_PART), self._paths(), strict=True):
            part.replace(final)
        sync_folder(self._folder)
        tokens, starts = (digest.hexdigest() for digest in self._digests)
        info = ShardInfo(
            name=self._name(),
            tokens=self._tokens,
            documents=self._documents,
            tokens_xxh3=tokens,
            starts_xxh3=starts,
        )
        self._shards.append(info)

    def _open(self, tokens: int, documents: int) -> None:
        """Open the current shard, cut to the lengths given, with the digests of what it keeps."""
        self._tokens, self._documents = tokens, documents
        self._streams: list[IO[bytes]] = []
        self._digests = []
        for part, final, size in zip(
            self._paths(_PART),
            self._paths(),
            (tokens * self._token_type.itemsize, documents * 8),
            strict=True,
        ):
            if final.exists():  # finished after the last commit
                final.replace(part)
            if not part.exists():
                part.touch()
            if part.stat().st_size < size:
                raise StaleStateError(f"{part} is shorter than at the last commit")
            os.truncate(part, size)
            stream = part.open("r+b")
            digest = xxhash.xxh3_128()
            while block := stream.read(1 << 20):
                digest.update(block)
            self._streams.append(stream)
            self._digests.append(digest)

    def _check_finished(self) -> None:
        for shard in self._shards:
            for suffix, digest in zip(_SUFFIXES, (shard.tokens_xxh3, shard.starts_xxh3), strict=True):
                path = self._folder / (shard.name + suffix)
                if not path.exists() or file_digest(path) != digest:
                    raise StaleStateError(f"{path} is missing or changed")

    def _delete_later_files(self, keep_open: bool) -> None:
        """Delete this split's files that the state does not know."""
        known = {shard.name for shard in self._shards} | ({self._name()} if keep_open else set())
        for path in split_files(self._folder, self._split):
            if path.name.split(".")[0] not in known:
                path.unlink()


def split_files(folder: Path, split: SplitName) -> list[Path]:
    """Every file of a split, finished or not, that lies in the folder."""
    number = "[0-9]" * 5
    return [
        p
        for suffix in _SUFFIXES
        for part in ("", _PART)
        for p in sorted(folder.glob(f"{split}-{number}{suffix}{part}"))
    ]
