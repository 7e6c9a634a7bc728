"""From a Hugging Face folder (config.json, safetensors, tokenizer.json) to a folder of ours that runs start from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridtrain.checkpoint.stored import LazyTensor
from hybridtrain.data.manifest import TOKENIZER
from hybridtrain.errors import FormatError, SettingsError, UserError
from hybridtrain.formats.families import FAMILIES, LACKING, Family
from hybridtrain.formats.folder import need_transformers
from hybridtrain.formats.ours import SEQ_LEN, ImportedTokenizer, model_tree, settings_of_import, write_run
from hybridtrain.formats.shards import SafetensorsFolder
from hybridtrain.formats.tensors import new_router_state, their_shape, to_ours
from hybridtrain.settings import Settings
from hybridtrain.weights import model_tensors

_IGNORED = ("rotary_emb.inv_freq",)  # computed, and stored by old versions only


def import_hf(folder: Path, out: Path, *, separator: str | None = None, seq_len: int | None = None) -> Settings:
    """Write `out`: a checkpoint of the weights alone, tokenizer and settings.toml; returns the settings.

    `separator` is the token before each document (default: the first usual one that the tokenizer has), `seq_len` the
    training length. One tensor of ours is in memory at a time.
    Raises FormatError listing everything that our model lacks and every tensor that is missing, unknown or of another shape.
    """
    config = _read_config(folder)
    family = _family(folder, config)
    problems = _lacking(config, family)
    settings = None
    try:
        settings = _settings(config, family, out, seq_len)
    except SettingsError as error:
        problems += error.problems
    tokenizer = ImportedTokenizer(folder / TOKENIZER, separator)
    problems += tokenizer.misfits(config.vocab_size)
    weights = SafetensorsFolder(folder)
    if settings is None or problems:
        raise FormatError(str(folder), problems)
    return write_run(out, settings, _tensors(folder, weights, settings, family), tokenizer, family.architecture)


def _read_config(folder: Path) -> Any:
    """The folder's config with the defaults of its model type, as transformers knows them."""
    path = folder / "config.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: is not JSON: {error}") from None
    transformers = need_transformers()
    model_type = tree.get("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        raise FormatError(str(folder), [f"model_type={json.dumps(model_type)} is none of {', '.join(FAMILIES)}"])
    try:
        return transformers.CONFIG_MAPPING[model_type].from_dict(tree)
    except Exception as error:  # each model type has checks of its own
        raise UserError(f"{path}: transformers refuses it: {error}") from None


def _family(folder: Path, config: Any) -> Family:
    family = FAMILIES.get(config.model_type)
    named = (config.architectures or [None])[0]
    if family is None or named not in (None, family.architecture):
        known = ", ".join(f.architecture for f in FAMILIES.values())
        raise FormatError(str(folder), [f"architecture {named or config.model_type} is none of {known}", *_lacking(config, family)])
    return family


def _lacking(config: Any, family: Family | None) -> list[str]:
    """What the config asks for and our model has not."""
    out = [
        f"{key}={json.dumps(value, default=str)}: {what}"
        for key, absent, what in LACKING
        if (value := getattr(config, key, None)) not in absent
    ]
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        out.append(f"rope_parameters.rope_type={json.dumps(rope['rope_type'])}: scaled rotations")
    if rope.get("partial_rotary_factor", 1.0) != 1:
        out.append(f"rope_parameters.partial_rotary_factor={rope['partial_rotary_factor']}: rotations of a part of each head")
    return out


def _settings(config: Any, family: Family, out: Path, seq_len: int | None) -> Settings:
    """Raises SettingsError where they contradict each other."""
    kinds = family.kinds(config)
    values = {ours: getattr(config, key, None) for key, ours in family.keys.items()} | dict(family.fixed)
    if values["attention.head_dim"] is None:
        values["attention.head_dim"] = config.hidden_size // config.num_attention_heads
    values["attention.rope_theta"] = config.rope_parameters["rope_theta"]
    if "moe" in kinds and "feedforward.router.bias_E" not in family.layer:
        values["moe.bias_rate"] = 0.0  # the architecture has no selection bias, and an export would have no place for it
    seq_len = seq_len or min(SEQ_LEN, config.max_position_embeddings)
    return settings_of_import(model_tree(values, kinds), out, seq_len, "config.json")


def _tensors(folder: Path, weights: SafetensorsFolder, settings: Settings, family: Family) -> dict[str, LazyTensor]:
    """Our tensors, to be made of theirs; FormatError where theirs are not the ones that the config promises."""
    expected: dict[str, tuple[int, ...]] = {}
    out: dict[str, LazyTensor] = {}
    for name, value in model_tensors(settings, settings.model.vocab_size).items():
        theirs = family.their_names(name, settings.model.moe.num_experts)
        shape = tuple(value.shape)
        expected |= dict.fromkeys(theirs, their_shape(name, shape))
        make = partial(_make, weights, name, theirs, settings.model.attention.head_dim, shape)
        out[f"model.{name}"] = LazyTensor(shape, torch.float32, make)
    problems = _tensor_problems(expected, weights.shapes, settings.model.tie_embeddings)
    if problems:
        raise FormatError(f"{folder}: its tensors are not those of {family.architecture} with its config.json", problems)
    return out


def _make(weights: SafetensorsFolder, name: str, theirs: tuple[str, ...], head_dim: int, shape: tuple[int, ...]) -> Tensor:
    if not theirs:
        return new_router_state(name, shape)
    return to_ours(name, map(weights.read, theirs), shape, head_dim)


def _tensor_problems(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], tied: bool) -> list[str]:
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [
        f"{name} has shape {list(found[name])}, must have {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    ignored = (*_IGNORED, *(["lm_head.weight"] if tied else []))
    return problems + [f"{name} has no place in our model" for name in found if name not in expected and not name.endswith(ignored)]
