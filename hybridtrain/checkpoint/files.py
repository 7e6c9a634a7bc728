"""The files of a checkpoint's tensors: written with a checksum on the way, read without a copy on the way.

They are torch's distributed checkpoint format: chunks of tensors, each as `torch.save` writes it, and an
index, `.metadata`.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, cast

import xxhash
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.utils import serialization

from hybridtrain.checkpoint.chunk import StoredChunk
from hybridtrain.checkpoint.index import Index
from hybridtrain.checkpoint.storage import flush_file, make_folder
from hybridtrain.files.durable import FileRecord

METADATA = ".metadata"  # torch's index of the tensors
CHUNK = 1 << 20  # bytes that are hashed and then written, while they are in the cache


Records = dict[str, dict[str, Any]]
"""By file name what a FileRecord says, as checkpoint.json has it."""


class Writer(FileSystemWriter):
    """torch's writer, into a folder or URL. `records` is what this rank has written, once `save` is done.

    `alive` is called for every part that was written.
    """

    def __init__(
        self, folder: Path, alive: Callable[[], None] = lambda: None, single_file_per_rank: bool = True
    ) -> None:
        super().__init__("", single_file_per_rank, sync_files=False)  # the files flush themselves
        self.path, self._files = folder, _Files(alive)
        self.fs = cast(Any, self._files)

    @property
    def records(self) -> Records:
        return {name: asdict(record) for name, record in self._files.records.items()}

    def storage_meta(self) -> StorageMeta:
        """Nothing: neither the folder's name nor a random number belong to what is saved."""
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        config = cast(Any, serialization.config)
        with config.patch(
            {"save.compute_crc32": False}
        ):  # it takes longer than ours, which is over the whole file
            return super().write_data(plan, planner)


class Reader(FileSystemReader):
    """torch's reader, from a folder or URL, that reads rows from their place in a file into their place in a
    tensor.

    `index` is the folder's. `alive` is called for every tensor, or chunk of one, that was read.
    """

    def __init__(self, folder: Path, index: Index, alive: Callable[[], None] = lambda: None) -> None:
        super().__init__("")
        self.path, self.fs, self.index, self._alive = folder, cast(Any, _Files()), index, alive

    def read_metadata(self) -> Metadata:  # torch's would unpickle whatever is there
        return Metadata(dict(self.index.tensors), storage_data=self.index.places, storage_meta=StorageMeta())

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        chunks = {
            MetadataIndex(name, c.offsets): c.sizes
            for name in {item.storage_index.fqn for item in plan.items}
            for c in self.index.tensors[name].chunks
        }
        for item in sorted(plan.items, key=lambda item: self._position(item.storage_index)):
            if item.type == LoadItemType.BYTE_IO:
                raise ValueError(f"{item.storage_index.fqn} is not a tensor")
            dtype = self.index.tensors[item.storage_index.fqn].properties.dtype
            chunk = StoredChunk.find(
                cast(Path, self.path),
                self.index.places[item.storage_index],
                chunks[item.storage_index],
                dtype,
            )
            target = planner.resolve_tensor(item).detach()
            low = item.storage_offsets[0] if chunk.shape else 0
            high = low + item.lengths[0] if chunk.shape else 1
            if tuple(item.lengths[1:]) == chunk.shape[1:]:
                chunk.read_into(target, low, high)
            else:
                rows = chunk.read(low, high)
                for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    rows = rows.narrow(dim, offset, length) if dim else rows
                target.copy_(rows)
            planner.commit_tensor(item, target)
            self._alive()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _position(self, index: Any) -> tuple[str, int]:
        place = self.index.places[index]
        return place.relative_path, place.offset


@contextmanager
def quiet() -> Generator[None, None, None]:
    """Without torch's warning that there is only one rank."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _Files(FileSystemBase):
    """The files of a folder or URL as torch's reader and writer ask for them; `records` is what was
    written.
    """

    def __init__(self, alive: Callable[[], None] = lambda: None) -> None:
        self.records: dict[str, FileRecord] = {}
        self._alive = alive

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[io.IOBase, None, None]:
        with path.open(mode) as raw:
            if mode == "rb":
                yield raw
                return
            stream = _Hashing(raw, self._alive)
            try:
                yield stream
            except Exception:
                if stream.error is not None:  # torch's archive, which is left unfinished, says that instead
                    raise stream.error from None
                raise
            flush_file(raw, path)
            self.records[path.name] = stream.record()

    def concat_path(self, path: Any, suffix: str) -> Any:
        return path / suffix

    def init_path(self, path: Any) -> Any:
        return path

    def rename(self, path: Any, new_path: Any) -> None:
        path.rename(new_path)
        self.records[new_path.name] = self.records.pop(path.name)

    def mkdir(self, path: Any) -> None:
        make_folder(path)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def exists(self, path: Any) -> bool:
        return bool(path.exists())

    def rm_file(self, path: Any) -> None:
        path.unlink()


class _Hashing(io.RawIOBase):
    """Hashes what passes through. `error` is why that could not be written."""

    def __init__(self, raw: IO[bytes], alive: Callable[[], None]) -> None:
        self._raw, self._digest, self._size, self._alive = raw, xxhash.xxh3_128(), 0, alive
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK):
            part = view[start : start + CHUNK]
            self._digest.update(part)
            try:
                self._raw.write(part)
            except OSError as error:
                self.error = error
                raise
            self._alive()
        self._size += len(view)
        return len(view)

    def flush(self) -> None:
        if not self._raw.closed:
            self._raw.flush()

    def tell(self) -> int:
        return self._size

    def record(self) -> FileRecord:
        return FileRecord(self._size, self._digest.hexdigest())
