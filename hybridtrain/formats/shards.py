"""Folders of safetensors files: read tensor by tensor, written shard by shard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hybridtrain.checkpoint.stored import LazyTensor
from hybridtrain.errors import DataError, UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsFolder:
    """The tensors of all safetensors files that the folder's index names, or of its single file.

    Raises DataError where there are none, or listing every file that is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}  # tensor name to its open file, which is mapped into memory
        self.shapes: dict[str, tuple[int, ...]] = {}
        problems = []
        for path in _files(folder):
            try:
                file = safe_open(path, "pt")
            except FileNotFoundError:
                problems.append(f"{path.name}: is named in {INDEX} and missing")
            except (OSError, SafetensorError) as error:
                problems.append(f"{path.name}: is damaged: {error}")
            else:
                for name in file.keys():  # noqa: SIM118  (no mapping, and not iterable)
                    self._files[name] = file
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())
        if problems:
            raise DataError("\n".join([f"{folder}: its weights cannot be read", *(f"  {p}" for p in problems)]))

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def _files(folder: Path) -> list[Path]:
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder / INDEX} is damaged: {error!r}") from None
    if not (folder / SINGLE).is_file():
        raise DataError(f"{folder} has neither {INDEX} nor {SINGLE}; other kinds of weights are not read")
    return [folder / SINGLE]


def write_safetensors(folder: Path, tensors: Mapping[str, LazyTensor], max_shard_bytes: int) -> None:
    """Write `model.safetensors`, or several files of at most `max_shard_bytes` (or one tensor) and their index.

    One shard is in memory at a time. Raises UserError where the disk refuses.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.num_bytes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        try:
            save_file({name: tensors[name].make().contiguous() for name in names}, folder / file, {"format": "pt"})
        except SafetensorError as error:
            raise UserError(f"{folder / file}: cannot be written: {error}") from None
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.num_bytes for t in tensors.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
