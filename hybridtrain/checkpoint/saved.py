"""A checkpoint folder with its description and its index, each read once and shared by all readers."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from hybridtrain.checkpoint.files import METADATA
from hybridtrain.checkpoint.index import MAX_INDEX, Index, read_index
from hybridtrain.checkpoint.info import INFO, read_info
from hybridtrain.errors import DamagedCheckpoint
from hybridtrain.files.untrusted import UntrustedFileError, read_bytes


class Saved:
    """The checkpoint folder `path`, finished or not. Its files are read when they are first asked for.

    A resume passes one such object through its checks and its load: reading and checking the index takes
    about 6 s per 100,000 chunks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, where: Path | Saved) -> Saved:
        """`where` itself, if it is one already."""
        return where if isinstance(where, Saved) else cls(where)

    @cached_property
    def finished(self) -> bool:
        """Whether it has a `checkpoint.json`."""
        return (self.path / INFO).is_file()

    @cached_property
    def info(self) -> dict[str, Any]:
        """The content of `checkpoint.json`. Raises what `read_info` raises."""
        return read_info(self.path)

    @cached_property
    def base(self) -> Saved | None:
        """The checkpoint beside it that holds the rows which this one does not; None where it holds all.

        Raises DamagedCheckpoint where it names itself.
        """
        if not self.finished or not self.info.get("base"):
            return None
        base = self.path.parent / self.info["base"]["name"]
        if base == self.path:
            raise DamagedCheckpoint(f"{self.path / INFO} is damaged: it names itself as its base")
        return Saved(base)

    @cached_property
    def index(self) -> Index:
        """The index of its tensors, checked.

        Raises DamagedCheckpoint where it is missing, damaged, contradicts itself, or has tensors elsewhere
        than in the folder's files.
        """
        path = self.path / METADATA
        files = None
        if self.finished:
            files = {name: record["size"] for name, record in self.info["files"].items()}
        try:
            index = read_index(read_bytes(path, MAX_INDEX), str(path))
            index.check(str(path), files)
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{self.path}: damaged: {METADATA} is missing") from None
        except OSError as error:
            raise DamagedCheckpoint(f"{path}: cannot be read: {error.strerror or error}") from None
        except UntrustedFileError as error:
            raise DamagedCheckpoint(
                f"{self.path}: damaged: its index of tensors cannot be read: {error}"
            ) from None
        return index
