"""Folders of safetensors files: read tensor by tensor, written shard by shard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hybridtrain.checkpoint.stored import LazyTensor
from hybridtrain.console import say
from hybridtrain.errors import DataError, UserError
from hybridtrain.files.untrusted import MAX_BYTES, UntrustedFileError, inside, parse_json, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class _Index(BaseModel):
    """`model.safetensors.index.json`; what else it says is not used."""

    weight_map: dict[str, str] = Field(min_length=1)


class SafetensorsFolder:
    """The tensors of a folder's model.safetensors, or where it has none, of the files that its index names,
    as transformers choose.

    A tensor is read from the file that the index names for it. Raises UntrustedFileError where the index is
    not one or names a file outside of the folder, and DataError where there are no weights, or listing every
    file that is missing or damaged, every tensor that its file lacks, and every one that stands in a file for
    which the index does not name it.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}  # tensor name to its open file, which is mapped into memory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype | str] = {}
        problems = []
        for path, named in _choose(folder).items():
            try:
                if path.exists() and not path.is_file():
                    raise OSError("is not a file")
                file = safe_open(path, "pt")
                names = list(file.keys())
                _check_header(path)
            except FileNotFoundError:
                problems.append(f"{path.name}: is named in {INDEX} and missing")
                continue
            except (OSError, SafetensorError, UntrustedFileError) as error:
                problems.append(f"{path.name}: is damaged: {error}")
                continue
            if named is not None:
                problems += [
                    f"{name}: is not in {path.name}, where {INDEX} says it is"
                    for name in sorted(named - set(names))
                ]
                problems += [
                    f"{name}: is in {path.name}, and {INDEX} does not name it there"
                    for name in names
                    if name not in named
                ]
            for name in names:
                self._files[name] = file
                self.shapes[name] = tuple(file.get_slice(name).get_shape())
                code = file.get_slice(name).get_dtype()
                self.dtypes[name] = _DTYPES.get(code, code)
        if problems:
            raise DataError(
                "\n".join([f"{folder}: its weights cannot be read", *(f"  {p}" for p in problems)])
            )

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def _check_header(path: Path) -> None:
    """Raises UntrustedFileError where a tensor stands twice in a file's header, of which the library takes
    the last.
    """
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        parse_json(stream.read(min(length, MAX_BYTES)), "its header", dict[str, Any])


def _choose(folder: Path) -> dict[Path, set[str] | None]:
    """The files to read, each with the tensors that the index names for it, or with None where no index is
    read.
    """
    if (folder / SINGLE).is_file():
        if left := sorted(path.name for path in folder.glob("*.safetensors*") if path.name != SINGLE):
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            say(f"{folder}: {SINGLE} is read, as transformers do; not read: {', '.join(left[:3])}{more}")
        return {folder / SINGLE: None}
    try:
        index = read_json(folder / INDEX, _Index)
    except FileNotFoundError:
        raise DataError(
            f"{folder} has neither {INDEX} nor {SINGLE}; other kinds of weights are not read"
        ) from None
    except OSError as error:
        raise DataError(f"{folder / INDEX}: cannot be read: {error.strerror}") from None
    files: dict[Path, set[str]] = {}
    for name, file in index.weight_map.items():
        path = inside(folder, file, str(folder / INDEX))
        if path.suffix != ".safetensors":
            raise UntrustedFileError(
                f"{folder / INDEX}: names the file {file!r} for {name}; only .safetensors files are read"
            )
        files.setdefault(path, set()).add(name)
    return dict(files)


def write_safetensors(folder: Path, tensors: Mapping[str, LazyTensor], max_shard_bytes: int) -> None:
    """Write `model.safetensors`, or several files of at most `max_shard_bytes` (or one tensor) and their
    index.

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
            save_file(
                {name: tensors[name].make().contiguous() for name in names}, folder / file, {"format": "pt"}
            )
        except SafetensorError as error:
            raise UserError(f"{folder / file}: cannot be written: {error}") from None
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(t.num_bytes for t in tensors.values())},
            "weight_map": weight_map,
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
