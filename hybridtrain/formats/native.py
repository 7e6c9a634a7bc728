"""Our side of every format: the checkpoint that is exported, and the run folder that an import makes."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybridtrain import __version__, checkpoint
from hybridtrain.checkpoint.stored import LazyTensor, StoredTensors, write_tensors
from hybridtrain.console import say
from hybridtrain.data.compress import compression_map, to_npy
from hybridtrain.data.manifest import COMPRESSION, TOKENIZER
from hybridtrain.data.tokenizer import find_separator, load_tokenizer, vocabulary_size
from hybridtrain.errors import CheckpointError, UserError
from hybridtrain.files.durable import file_digest, write_atomically
from hybridtrain.formats.folder import new_folder
from hybridtrain.formats.origin import Origin
from hybridtrain.formats.tensors import DTYPES, is_stacked, to_theirs
from hybridtrain.formats.values import Values
from hybridtrain.model.build import layer_components
from hybridtrain.model.engram import ENGRAM
from hybridtrain.model.registry import BUILT_IN
from hybridtrain.run.init_from import ORIGIN, check_tensors, copy_companions
from hybridtrain.run.run_folder import SETTINGS, find_checkpoint
from hybridtrain.settings.layers import layer_specs
from hybridtrain.settings.load import dump_settings, parse_settings
from hybridtrain.settings.tree import Settings

SEQ_LEN = 1024  # where the model can see further: what fits a small machine
LEARNING_RATE = 1e-4  # of going on with trained weights; the default is for new ones
AS_IMPORTED = "auto"  # dtype of an export
ROUTER_STATE = (
    "router.load_E",
    "router.bias_E",
)  # of training; biases that are not zero are a misfit where they have no place


class Source(NamedTuple):
    """A checkpoint to export: its run folder, its description, its settings, its tensors."""

    run: Path
    info: dict[str, Any]
    settings: Settings
    stored: StoredTensors

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the model's tensors, without the lookup table."""
        for name, shape in self.stored.shapes.items():
            if name.startswith("model."):
                yield name.removeprefix("model."), shape

    def make(self, name: str, expert: int | None = None) -> Tensor:
        """The tensor, or that of one expert, in the order that published models have (tensors.py)."""
        head_dim = self.settings.model.attention.head_dim
        if is_stacked(name) and expert is not None:
            return to_theirs(name, self.stored.read(f"model.{name}", expert, expert + 1)[0], head_dim)
        return to_theirs(name, self.stored.read(f"model.{name}"), head_dim)


def open_source(path: Path) -> Source:
    """The run folder or checkpoint `path`, verified, for an export.

    Raises CheckpointError where it is damaged or has no tokenizer.
    """
    run, saved = find_checkpoint(path)
    if not (run / TOKENIZER).is_file():
        raise CheckpointError(f"{run} lacks {TOKENIZER}, which belongs to its checkpoints")
    opened = checkpoint.Saved(saved)
    info = opened.info
    settings = parse_settings(info["settings"], source=str(saved))
    if file_digest(run / TOKENIZER) != info["tokenizer_digest"]:
        raise CheckpointError(
            f"{run / TOKENIZER} is another tokenizer than the one that {saved} was trained with"
        )
    checkpoint.verify(opened, settings.checkpoint.verify)
    stored = StoredTensors(opened)
    check_tensors(stored, settings, info)
    return Source(run, info, settings, stored)


def unnamed(settings: Settings, to: str) -> list[str]:
    """The components of the layers whose parameters the format `to` has no names for, a problem each."""
    ours = (*BUILT_IN.all, ENGRAM)
    used = [c for spec in layer_specs(settings) for c in layer_components(settings, spec).values()]
    names = {c.name for c in used if to not in c.formats or not any(c is other for other in ours)}
    return [f"{name}: the format {to} has no names for its parameters" for name in sorted(names)]


def biased(stored: StoredTensors) -> bool:
    """Whether some router's selection bias is not zero."""
    biases = [name for name in stored.shapes if name.startswith("model.") and name.endswith("router.bias_E")]
    return any(bool(stored.read(name).any()) for name in biases)


def output_dtype(dtype: str, origin: Origin) -> str:
    """The dtype of an export's matrices, of DTYPES: `dtype`, or for "auto" that of the import, float32 where
    there was none.
    """
    if dtype not in (*DTYPES, AS_IMPORTED):
        raise UserError(f'--dtype "{dtype}": it may be {", ".join((*DTYPES, AS_IMPORTED))}')
    if dtype != AS_IMPORTED:
        return dtype
    if origin.dtype in DTYPES and origin.dtype != "float32":
        say(
            f"matrices are written in {origin.dtype}, as they were imported; --dtype float32 writes what "
            "training has"
        )
    return origin.dtype if origin.dtype in DTYPES else "float32"


def setting(model: Any, key: str) -> Any:
    """The setting `key`, with its section, below `model`."""
    for part in key.split("."):
        model = getattr(model, part)
    return model


def model_tree(values: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """The section `model` of settings from values by key and "dense" or "moe" for each layer."""
    runs = [(kind, len(list(run))) for kind, run in itertools.groupby(kinds)]
    layers = [f"{count}*attention+{kind}" if count > 1 else f"attention+{kind}" for kind, count in runs]
    model: dict[str, Any] = {"layers": layers, "attention": {}, "dense": {}, "moe": {}}
    for key, value in values.items():
        section, _, leaf = key.rpartition(".")
        (model[section] if section else model)[leaf] = value
    return model


def settings_of_import(model: dict[str, Any], out: Path, seq_len: int, source: str) -> Settings:
    """The settings that a run goes on with from weights in `out`. Raises SettingsError where they contradict
    each other.
    """
    tree = {
        "run": {"dir": f"{out}-train"},
        "data": {"path": str(out / "data"), "tokenizer": str(out / TOKENIZER)},
        "model": model,
        "optim": {"lr": LEARNING_RATE},
        "train": {"init_from": str(out), "seq_len": seq_len, "global_batch": 32, "micro_batches": 8},
    }
    return parse_settings(tree, source=source)


class ImportedTokenizer:
    """The tokenizer of an import, and its token before each document: `separator`, or the first usual one
    that it has.
    """

    def __init__(self, path: Path, separator: str | None) -> None:
        self.path = path
        tokenizer = load_tokenizer(path)
        self.separator, self.separator_id = find_separator(tokenizer, separator)
        self.entries = vocabulary_size(tokenizer)
        self.compression = compression_map(tokenizer)

    def misfits(self, rows: int) -> list[str]:
        """Why an embedding of so many rows is not for it."""
        return (
            [f"{self.path.name} has {self.entries} entries, the embedding {rows} rows"]
            if self.entries > rows
            else []
        )


class Import(NamedTuple):
    """An import: the architecture's name, our tensors to be made, the check of their values, and the
    description that came with them.
    """

    architecture: str
    tensors: Mapping[str, LazyTensor]
    values: Values
    origin: Origin


def write_run(out: Path, settings: Settings, imported: Import, tokenizer: ImportedTokenizer) -> Settings:
    """Make the folder `out`: tokenizer, settings, and a checkpoint of the weights alone; returns the
    settings, with the separator.

    Two tensors are in memory at a time. Raises FormatError, and leaves nothing, where weights hold NaN or
    infinite values.
    """
    settings = settings.model_copy(
        update={"data": settings.data.model_copy(update={"separator": tokenizer.separator})}
    )
    with new_folder(out) as made:
        shutil.copyfile(tokenizer.path, made / TOKENIZER)
        copy_companions(tokenizer.path.parent, made)
        write_atomically(made / ORIGIN, json.dumps(imported.origin.model_dump(), indent=2).encode())
        write_atomically(made / COMPRESSION, to_npy(tokenizer.compression))
        write_atomically(made / SETTINGS, dump_settings(settings).encode())
        staging = made / "checkpoints" / "partial"
        staging.mkdir(parents=True)
        info = {
            "format": checkpoint.FORMAT,
            "step": 0,
            "sequences": 0,
            "version": __version__,
            "torch": torch.__version__,
            "layout": f"imported from {imported.architecture}",
            "weights_only": True,
            "identity": checkpoint.identity(settings),
            "vocab_size": settings.model.vocab_size,
            "separator_id": tokenizer.separator_id,
            "tokenizer_digest": file_digest(made / TOKENIZER),
            "addressing": None,
            "table_scalars": None,
            "settings": settings.model_dump(mode="json"),
            "files": write_tensors(staging, imported.tensors),
        }
        imported.values.check()
        checkpoint.commit_folder(staging, staging.with_name("step-00000000"), info)
    return settings
