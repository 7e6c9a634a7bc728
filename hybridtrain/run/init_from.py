"""The weights of a checkpoint without its run: their names, and a new run that starts from them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hybridtrain import checkpoint
from hybridtrain.checkpoint.dtypes import dtype_problems
from hybridtrain.checkpoint.stored import StoredTensors
from hybridtrain.console import say
from hybridtrain.data.compress import read_compression
from hybridtrain.data.manifest import COMPRESSION, Manifest
from hybridtrain.errors import CheckpointError, DamagedCheckpoint
from hybridtrain.files.untrusted import first_of
from hybridtrain.kernels.engram_hash.addressing import Addressing, AddressingError
from hybridtrain.model.lm import HybridLM
from hybridtrain.optim.row_optimizer import make_row_optimizer
from hybridtrain.run.assemble import Run, addressing_misfits
from hybridtrain.run.run_folder import find_checkpoint
from hybridtrain.settings.engram import EngramSettings
from hybridtrain.settings.layers import engram_layers, layer_specs
from hybridtrain.settings.load import parse_settings
from hybridtrain.settings.tree import Settings

ROWS_AT_ONCE = 1 << 18
# what an import found in the model's own description, for exports to give back (formats/origin.py)
ORIGIN = "origin.json"
# Files beside the weights of a published model. Runs that start from an import keep them, and an export gives
# them back.
VOCABULARY = (
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
    "tokenizer.model",
)  # describe the same tokens again
COMPANIONS = (
    *(
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "chat_template.jinja",
        "chat_template.json",
    ),
    *VOCABULARY,
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md"),
)
TEMPLATES = "additional_chat_templates"  # a folder of *.jinja


def model_tensors(settings: Settings, vocab_size: int) -> dict[str, Tensor]:
    """Every parameter and buffer of the whole model by its name, on the meta device."""
    with torch.device("meta"):
        tensors: dict[str, Tensor] = HybridLM(settings, vocab_size).state_dict()
    return tensors


def check_tensors(stored: StoredTensors, settings: Settings, info: Mapping[str, Any]) -> None:
    """Raise DamagedCheckpoint listing the model's tensors that differ from the settings of the checkpoint:
    missing ones, other shapes, dtypes that are not floating-point, and tensors that such a model does not
    have.

    `info` is the checkpoint's own description. The check comes before memory is taken for a model of those
    settings.
    """
    have = {name: shape for name, shape in stored.shapes.items() if name.startswith("model.")}
    layers = {name.split(".")[2] for name in have if name.startswith("model.layers.")}
    if len(layers) != (said := len(layer_specs(settings))):
        raise DamagedCheckpoint(
            f"{stored.path}: its tensors are not those of its settings: {len(layers)} layers, and they say "
            f"{said}"
        )
    try:
        expected = {
            f"model.{name}": tuple(value.shape)
            for name, value in model_tensors(settings, info["vocab_size"]).items()
        }
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:  # sizes that no tensor can have
        raise DamagedCheckpoint(f"{stored.path}: no model has its settings: {str(error)[:300]}") from None
    problems = [
        f"{name}: it has {list(have[name]) if name in have else 'none'}, its settings say {list(shape)}"
        for name, shape in expected.items()
        if have.get(name) != shape
    ]
    problems += [f"{name}: a model of its settings has none" for name in have if name not in expected]
    problems += dtype_problems({name: stored.dtype(name) for name in have})
    if problems:
        lines = [f"{stored.path}: its tensors are not those of its settings", *first_of(problems)]
        raise DamagedCheckpoint("\n  ".join(lines))


def read_compression_of(run: Path, info: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    """The compression map, int64 [V], of a run folder whose checkpoint has the description `info`. Raises
    CheckpointError, or DataError.
    """
    try:
        compression = read_compression(run / COMPRESSION, info["vocab_size"])
    except OSError as error:
        raise CheckpointError(f"{run / COMPRESSION}: cannot be read: {error.strerror}") from None
    if info["separator_id"] >= len(compression):
        raise CheckpointError(
            f"{run / COMPRESSION}: has {len(compression)} tokens, and the separator is {info['separator_id']}"
        )
    return compression


def read_addressing(
    info: Mapping[str, Any], settings: Settings, compression: npt.NDArray[np.int64], stored: StoredTensors
) -> Addressing | None:
    """The addressing of a checkpoint, with the compression map int64 [V] of its run folder; None without
    Engram layers.

    Raises CheckpointError where it is missing or damaged, belongs to another map or to other settings, or
    differs from the table in its number of rows.
    """
    if not engram_layers(settings):
        return None
    if info["addressing"] is None:
        raise CheckpointError(f"{stored.path}: its settings have an engram, and it has no addressing")
    try:
        addressing = Addressing.from_json(info["addressing"], compression)
    except AddressingError as error:
        raise CheckpointError(f"{stored.path}: {error}") from None
    problems = addressing_misfits(addressing, settings)
    table = stored.shapes.get("table.rows", ())
    if table != (addressing.num_rows, settings.engram.head_dim):
        problems.append(
            f"it has {addressing.num_rows} rows of {settings.engram.head_dim}, the table is {list(table)}"
        )
    if problems:
        raise CheckpointError(
            "\n  ".join([f"{stored.path}: its addressing does not fit its table", *problems])
        )
    return addressing


def copy_companions(source: Path, target: Path, *names: str) -> None:
    """Copy those of COMPANIONS, of the chat templates and of `names` that the folder `source` has into the
    folder `target`.
    """
    templates = [f"{TEMPLATES}/{path.name}" for path in sorted((source / TEMPLATES).glob("*.jinja"))]
    for name in (*names, *COMPANIONS, *templates):
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)


def read_rows(
    stored: StoredTensors, info: dict[str, Any], engram: EngramSettings, low: int, high: int
) -> Tensor:
    """Rows `low` to `high-1` of a checkpoint's table as a reader would see them: with the weight decay that
    they owe.

    `info` is the checkpoint's own description.
    """
    table_RD = stored.read("table.rows", low, high).float()
    scalars = info["table_scalars"]
    if scalars and "decay_log" in scalars:
        optimizer = make_row_optimizer(engram, table_RD)
        for name, value in optimizer.state.items():
            value.copy_(stored.read(f"table.state.{name}", low, high))
        try:
            optimizer.load_scalars(scalars)
        except ValueError as error:
            raise DamagedCheckpoint(f"{stored.path}: damaged: {error}") from None
        optimizer.catch_up(torch.arange(high - low))
    return table_RD


def start_from(run: Run, path: Path, folder: Path, data: Manifest) -> None:
    """Fill the parts of a new run in `folder` on `data` with the weights of the run folder or checkpoint
    `path`; any layouts.

    Optimizers start afresh. Engram layers that the checkpoint lacks stay as they were drawn. Raises
    CheckpointError listing every other tensor that one side lacks or has in another shape, another tokenizer,
    separator or addressing.
    """
    source, saved = find_checkpoint(path)
    opened = checkpoint.Saved(saved)
    checkpoint.verify(opened, run.settings.checkpoint.verify, run.mesh.world)
    info, stored = opened.info, StoredTensors(opened)
    expected = {
        f"model.{name}": tuple(value.shape)
        for name, value in model_tensors(run.settings, run.vocabulary.size).items()
    }
    problems = _problems(run, data, expected, opened.info, stored)
    if problems:
        raise CheckpointError(
            "\n".join([f"train.init_from={path}: {len(problems)} problem(s)", *(f"  {p}" for p in problems)])
        )
    taken = expected.keys() & stored.shapes.keys()
    for stage in run.model_parts:
        state = {f"model.{k}": v for k, v in stage.state_dict().items() if f"model.{k}" in taken}
        checkpoint.read_into(state, opened, run.mesh.world)
    if run.table is not None and info["addressing"]:
        theirs_engram = parse_settings(info["settings"], source=str(saved)).engram
        for low in range(run.table.low, run.table.high, ROWS_AT_ONCE):
            high = min(low + ROWS_AT_ONCE, run.table.high)
            rows_RD = read_rows(stored, info, theirs_engram, low, high)
            run.table.weight[low - run.table.low : high - run.table.low] = rows_RD.to(run.table.weight)
    if run.mesh.rank == 0:
        copy_companions(source, folder, ORIGIN)
        _tell(run.settings, saved, info, len(taken), len(expected) - len(taken))
        if not info.get("weights_only"):
            _tell_of_data(run.settings, checkpoint.Consumed.of(info), data)


def _problems(
    run: Run,
    data: Manifest,
    expected: dict[str, tuple[int, ...]],
    info: Mapping[str, Any],
    stored: StoredTensors,
) -> list[str]:
    """Why the checkpoint does not fit the run and its data; `expected` are the model's shapes by name."""
    addressing = run.table.addressing.to_json() if run.table is not None else None
    theirs = {name: shape for name, shape in stored.shapes.items() if name.startswith("model.")}
    problems = _misfits(expected, theirs) + dtype_problems({name: stored.dtype(name) for name in theirs})
    if info["tokenizer_digest"] != data.tokenizer_xxh3:
        problems.append(
            f"tokenizer: the checkpoint was trained with {info['tokenizer_digest']}, the data has "
            f"{data.tokenizer_xxh3}"
        )
    elif (separator := info["separator_id"]) != run.vocabulary.separator_id:
        ours = run.vocabulary.separator_id
        problems.append(
            f"separator: the checkpoint has token {separator} before each document, the data {ours} "
            "(data.separator)"
        )
    if info["addressing"] and addressing and info["addressing"] != addressing:
        problems.append(
            "engram: the table cannot be taken over: layers, orders, multipliers, primes or compression map "
            "differ"
        )
    elif info["addressing"] and run.table is not None:
        there, here = (
            stored.shapes.get("table.rows", ()),
            (run.table.addressing.num_rows, run.settings.engram.head_dim),
        )
        if there != here:
            problems.append(f"table.rows: the checkpoint has {list(there)}, this model {list(here)}")
    return problems


def _misfits(ours: dict[str, tuple[int, ...]], theirs: dict[str, tuple[int, ...]]) -> list[str]:
    problems = [
        f"{name}: the checkpoint has {list(theirs[name])}, this model {list(shape)}"
        for name, shape in ours.items()
        if name in theirs and theirs[name] != shape
    ]
    lacking = [name for name in ours if name not in theirs and ".engram." not in name]
    problems += [f"{name}: the checkpoint lacks it; only an engram may be new" for name in lacking]
    problems += [f"{name}: this model lacks it" for name in theirs if name not in ours]
    return problems


def _tell(settings: Settings, saved: Path, info: dict[str, Any], taken: int, drawn: int) -> None:
    """Say what was taken, and which settings of equal shapes make another function of the same weights."""
    say(f"starting from {saved}: {taken} tensors taken, {drawn} of new Engram layers drawn")
    for key, value in checkpoint.identity(settings).items():
        theirs = info["identity"].get(key, value)
        if key.startswith("model.") and key != "model.layers" and theirs != value:
            say(f"  {key}={value}, and the weights were trained with {theirs}")


def _tell_of_data(settings: Settings, theirs: checkpoint.Consumed, data: Manifest) -> None:
    """Say where the validation split may hold what the weights were trained on."""
    path, ours = settings.data.path, data.validation.digest
    if ours and theirs.train is None:
        say(
            "  the weights' run does not say what it was trained on, which may be in the validation split "
            f"of data.path={path}"
        )
    elif ours and theirs.validation != ours:
        say(
            f"  data.path={path}: its validation split is not that of the weights' run, which may have been "
            "trained on some of it"
        )
