"""Reads a data folder: memory-mapped token shards, checked against the manifest when they are opened.

Legend: V vocabulary, T tokens.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from hybridtrain.data.compress import read_compression
from hybridtrain.data.manifest import COMPRESSION, TOKENIZER, Manifest, ShardInfo, SplitName, read_manifest
from hybridtrain.errors import DataError
from hybridtrain.files.durable import file_digest


class Split:
    """The tokens of one split as one array: window by window, across the borders of shards."""

    def __init__(self, name: SplitName, folder: Path, manifest: Manifest) -> None:
        info = manifest.split(name)
        self.name = name
        self._vocab_size = manifest.vocab_size
        self.num_tokens = info.tokens
        self.num_bytes = info.bytes
        self.num_documents = info.documents
        self.separator_id = manifest.separator_id
        token_type = np.dtype(manifest.dtype).newbyteorder("<")
        self._tokens = [
            _map(folder / f"{shard.name}.tokens", token_type, shard.tokens) for shard in info.shards
        ]
        self._starts = [
            _map(folder / f"{shard.name}.starts", np.dtype("<i8"), shard.documents) for shard in info.shards
        ]
        self._files = [_files(folder, shard, token_type.itemsize) for shard in info.shards]
        self._ends = np.cumsum([shard.tokens for shard in info.shards], dtype=np.int64)

    def window(self, start: int, length: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Tokens int64 [length] from position `start` on, and bool [length], True where a document starts.

        Raises IndexError where the window leaves the split, DataError where a shard is gone or was cut since
        it was opened: a mapped file that was cut ends the process without a word when it is read.
        """
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(
                f"window [{start}, {start + length}) leaves the {self.num_tokens} tokens of {self.name}"
            )
        tokens_T = np.empty(length, np.int64)
        starts_T = np.zeros(length, np.bool_)
        shard = int(np.searchsorted(self._ends, start, side="right"))
        done = 0
        while done < length:
            for path, size in self._files[shard]:
                if problem := _size_problem(path, size):
                    raise DataError(f"{path.parent}: {problem}; it was whole when the run began")
            base = int(self._ends[shard - 1]) if shard else 0
            low = start + done - base
            high = min(low + length - done, int(self._ends[shard]) - base)
            tokens_T[done : done + high - low] = self._tokens[shard][low:high]
            first, last = np.searchsorted(self._starts[shard], (low, high))
            starts = self._starts[shard][first:last]
            if len(starts) and not low <= starts.min() <= starts.max() < high:
                raise DataError(f"{self._files[shard][1][0]}: its starts are not in order")
            starts_T[starts - low + done] = True
            done += high - low
            shard += 1
        if length and (
            int(tokens_T.max()) >= self._vocab_size or (tokens_T[starts_T] != self.separator_id).any()
        ):
            raise DataError(
                f"{self._files[0][0][0].parent}: {self.name} has tokens that its tokenizer has not, or no "
                "separator at a start"
            )
        return tokens_T, starts_T


class TokenDataset:
    """A finished data folder: its manifest, tokenizer, compression map (int64 [V]) and splits."""

    def __init__(self, folder: Path, manifest: Manifest, compression: npt.NDArray[np.int64]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.compression = compression

    @classmethod
    def open(cls, path: Path | str, verify: bool = True) -> TokenDataset:
        """Open a folder written by `hybridtrain data`; `verify` also compares every shard with its checksum.

        Raises DataError naming every file that is missing, cut short, damaged or of another preparation.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        problems = _artefact_problems(folder, manifest)
        for split in (manifest.train, manifest.validation):
            for shard in split.shards:
                problems += _shard_problems(folder, shard, np.dtype(manifest.dtype).itemsize, verify)
        if problems:
            raise DataError(
                "\n".join([f"{folder}: {len(problems)} problem(s)", *(f"  {p}" for p in problems)])
            )
        compression = read_compression(folder / COMPRESSION)
        if compression.shape != (manifest.vocab_size,):
            raise DataError(
                f"{folder / COMPRESSION}: is int64 {list(compression.shape)}, not int64 "
                f"[{manifest.vocab_size}]"
            )
        return cls(folder, manifest, compression)

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / TOKENIZER

    def split(self, name: SplitName) -> Split:
        """The split called "train" or "validation"; it may be empty."""
        return Split(name, self.folder, self.manifest)


def _map(path: Path, dtype: np.dtype[np.generic], length: int) -> npt.NDArray[np.int64]:
    if length == 0:  # an empty file cannot be mapped
        return np.empty(0, np.int64)
    return np.memmap(path, dtype, mode="r", shape=(length,))


def _artefact_problems(folder: Path, manifest: Manifest) -> list[str]:
    digests = {TOKENIZER: manifest.tokenizer_xxh3, COMPRESSION: manifest.compression_xxh3}
    problems = [
        _digest_problem(folder / name, digest, "not the one this data was made with")
        for name, digest in digests.items()
    ]
    return [problem for problem in problems if problem]


def _digest_problem(path: Path, digest: str, otherwise: str) -> str:
    """Why the file does not have that digest: it is missing, unreadable or `otherwise`; else ""."""
    try:
        found = file_digest(path)
    except FileNotFoundError:
        return f"{path.name}: is missing"
    except OSError as error:
        return f"{path.name}: cannot be read: {error.strerror}"
    return "" if found == digest else f"{path.name}: is {otherwise} (xxh3 {found}, manifest {digest})"


def _files(folder: Path, shard: ShardInfo, token_bytes: int) -> list[tuple[Path, int]]:
    """A shard's files with their sizes in bytes."""
    return [
        (folder / f"{shard.name}.tokens", shard.tokens * token_bytes),
        (folder / f"{shard.name}.starts", shard.documents * 8),
    ]


def _size_problem(path: Path, size: int) -> str:
    try:
        actual = path.stat().st_size
    except FileNotFoundError:
        return f"{path.name}: is missing"
    return "" if actual == size else f"{path.name}: has {actual:,} bytes instead of {size:,}"


def _shard_problems(folder: Path, shard: ShardInfo, token_bytes: int, verify: bool) -> list[str]:
    problems = []
    for (path, size), digest in zip(
        _files(folder, shard, token_bytes), (shard.tokens_xxh3, shard.starts_xxh3), strict=True
    ):
        if problem := _size_problem(path, size) or (
            _digest_problem(path, digest, "damaged") if verify else ""
        ):
            problems.append(problem)
    if verify and not problems and shard.documents:
        starts = _map(folder / f"{shard.name}.starts", np.dtype("<i8"), shard.documents)
        if starts[0] < 0 or starts[-1] >= shard.tokens or (np.diff(starts) <= 0).any():
            problems.append(f"{shard.name}.starts: is not a rising list of places in {shard.tokens:,} tokens")
    return problems
