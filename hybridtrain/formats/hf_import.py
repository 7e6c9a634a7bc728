"""From a Hugging Face folder (config.json, safetensors, tokenizer.json) to a folder of ours that runs start
from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hybridtrain.checkpoint.dtypes import dtype_problems
from hybridtrain.checkpoint.stored import LazyTensor
from hybridtrain.console import say
from hybridtrain.data.manifest import TOKENIZER
from hybridtrain.errors import FormatError, SettingsError
from hybridtrain.formats.families import OUTSIDE, Family
from hybridtrain.formats.hf_config import Config, generation_ids, problems_of, read_config
from hybridtrain.formats.native import (
    SEQ_LEN,
    Import,
    ImportedTokenizer,
    model_tree,
    settings_of_import,
    write_run,
)
from hybridtrain.formats.origin import Origin
from hybridtrain.formats.shards import SafetensorsFolder
from hybridtrain.formats.tensors import new_router_state, their_shape, to_ours
from hybridtrain.formats.values import Values
from hybridtrain.run.init_from import model_tensors
from hybridtrain.settings.tree import Settings

# computed from rope_theta, and stored by old versions only; transformers ignore it
_FREQUENCIES = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_ADAPTER = "adapter_config.json"
_EMBEDDING, _HEAD = OUTSIDE["embed.weight"], OUTSIDE["head.weight"]


def import_hf(
    folder: Path, out: Path, *, separator: str | None = None, seq_len: int | None = None
) -> Settings:
    """Write `out`: a checkpoint of the weights alone, tokenizer and settings.toml; returns the settings.

    `separator` is the token before each document (default: the first usual one that the tokenizer has),
    `seq_len` the training length. One tensor of ours is in memory at a time. Raises FormatError listing
    everything that our model lacks and every tensor that is missing, unknown, of another shape or of a dtype
    that is not read, or that holds NaN or infinite values.
    """
    config = read_config(folder)
    tokenizer = ImportedTokenizer(folder / TOKENIZER, separator)
    generation_ids(folder)  # refused now, where it is damaged, and not by an export
    weights = SafetensorsFolder(folder)
    problems, settings = problems_of(config), None
    if (folder / _ADAPTER).is_file():
        problems.append(
            f"{_ADAPTER}: an adapter, which transformers put over the weights; merge it into them first"
        )
    try:
        settings = _settings(config, out, seq_len, tied=_is_tied(folder, config, weights))
    except SettingsError as error:
        problems += error.problems
    problems += tokenizer.misfits(config.values.vocab_size)
    if settings is None or problems:
        raise FormatError(str(folder), problems)
    _check_tensors(folder, weights, settings, config)
    if config.told:
        said = ", ".join(f"{key}={json.dumps(value)[:60]}" for key, value in config.told.items())
        say(
            f"{folder}: keys of config.json that transformers' {config.family.architecture} does not know "
            f"either: {said}"
        )
    values = Values(str(folder))
    dtype, positions = (
        str(weights.dtypes[_EMBEDDING]).removeprefix("torch."),
        config.values.max_position_embeddings,
    )
    origin = Origin(config=config.tree, dtype=dtype, positions=positions)
    tensors = _tensors(weights, settings, config.family, values)
    return write_run(out, settings, Import(config.family.architecture, tensors, values, origin), tokenizer)


def _is_tied(folder: Path, config: Config, weights: SafetensorsFolder) -> bool:
    """Whether embedding and head are one. They are two, as in transformers, where both are stored and
    differ.
    """
    tied = bool(config.values.tie_word_embeddings)
    dtypes = {name: weights.dtypes[name] for name in (_EMBEDDING, _HEAD) if name in weights.dtypes}
    if not tied or len(dtypes) < 2 or dtype_problems(dtypes):
        return tied
    same_shape = weights.shapes[_EMBEDDING] == weights.shapes[_HEAD]
    blocks = zip(*(weights.read(name).flatten().split(1 << 22) for name in (_EMBEDDING, _HEAD)), strict=False)
    if same_shape and all(torch.equal(embedding.float(), head.float()) for embedding, head in blocks):
        return True
    say(
        f"{folder}: config.json says tie_word_embeddings=true, and {_HEAD} differs from {_EMBEDDING}: "
        "imported untied, as transformers load it"
    )
    return False


def _settings(config: Config, out: Path, seq_len: int | None, tied: bool) -> Settings:
    """The settings of the import. Raises SettingsError where they contradict each other."""
    family, kinds = config.family, config.kinds
    values = {ours: config.get(key) for key, ours in family.keys.items()} | dict(family.fixed)
    values |= {"attention.rope_theta": config.rotations.rope_theta, "tie_embeddings": tied}
    if "moe" in kinds and "feedforward.router.bias_E" not in family.layer:
        values["moe.bias_rate"] = (
            0.0  # the architecture has no selection bias, and an export would have no place for it
        )
    seq_len = seq_len or min(SEQ_LEN, config.values.max_position_embeddings)
    return settings_of_import(model_tree(values, kinds), out, seq_len, "config.json")


def _check_tensors(folder: Path, weights: SafetensorsFolder, settings: Settings, config: Config) -> None:
    """Raises FormatError where the stored tensors are not the ones that the config promises."""
    most = max(
        config.values.num_hidden_layers, settings.model.moe.num_experts if "moe" in config.kinds else 0
    )
    if most > len(weights.shapes):  # before a model of so many is described
        raise FormatError(
            str(folder),
            [f"config.json promises {most} layers or experts, and {len(weights.shapes)} tensors are stored"],
        )
    expected: dict[str, tuple[int, ...]] = {}
    for name, value in model_tensors(settings, settings.model.vocab_size).items():
        theirs = config.family.their_names(name, settings.model.moe.num_experts)
        expected |= dict.fromkeys(theirs, their_shape(name, tuple(value.shape)))
    if config.values.tie_word_embeddings and _HEAD in weights.shapes:
        expected[_HEAD] = expected[_EMBEDDING]
    problems = _tensor_problems(expected, weights.shapes)
    problems += dtype_problems({name: weights.dtypes[name] for name in expected if name in weights.dtypes})
    problems += _frequency_problems(weights, settings)
    if problems:
        raise FormatError(
            f"{folder}: its tensors are not those of {config.family.architecture} with its config.json",
            problems,
        )


def _tensors(
    weights: SafetensorsFolder, settings: Settings, family: Family, values: Values
) -> dict[str, LazyTensor]:
    """Our tensors, to be made of theirs."""
    out = {}
    for name, value in model_tensors(settings, settings.model.vocab_size).items():
        theirs, shape = family.their_names(name, settings.model.moe.num_experts), tuple(value.shape)
        make = partial(_make, weights, values, name, theirs, settings.model.attention.head_dim, shape)
        out[f"model.{name}"] = LazyTensor(shape, torch.float32, make)
    return out


def _make(
    weights: SafetensorsFolder,
    values: Values,
    name: str,
    theirs: tuple[str, ...],
    head_dim: int,
    shape: tuple[int, ...],
) -> Tensor:
    if not theirs:
        return new_router_state(name, shape)
    return to_ours(name, (values.take(their, weights.read(their)) for their in theirs), shape, head_dim)


def _tensor_problems(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> list[str]:
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [
        f"{name} has shape {list(found[name])}, must have {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    unknown = [name for name in found if name not in expected and not _FREQUENCIES.fullmatch(name)]
    return problems + [f"{name} has no place in our model" for name in unknown]


def _frequency_problems(weights: SafetensorsFolder, settings: Settings) -> list[str]:
    """Stored rotation frequencies that are not those of rope_theta, beyond the rounding of a dtype of 8 bits
    of precision.
    """
    a = settings.model.attention
    ours = a.rope_theta ** (-torch.arange(0, a.head_dim, 2, dtype=torch.float64) / a.head_dim)
    out = []
    for name in filter(_FREQUENCIES.fullmatch, weights.shapes):
        if dtype_problems({name: weights.dtypes[name]}) or weights.shapes[name] != tuple(ours.shape):
            out.append(
                f"{name} is {weights.dtypes[name]} of shape {list(weights.shapes[name])}, must be "
                f"[{len(ours)}] floats"
            )
        elif not torch.allclose(weights.read(name).double(), ours, rtol=1e-2, atol=1e-7):
            out.append(f"{name} holds other rotation frequencies than rope_theta={a.rope_theta} gives")
    return out
