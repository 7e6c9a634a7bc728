"""From a checkpoint of ours to a Hugging Face folder: as a published architecture where one is the same model, else as our own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hybridtrain.checkpoint.stored import LazyTensor
from hybridtrain.data.manifest import TOKENIZER
from hybridtrain.data.tokenizer import load_tokenizer
from hybridtrain.errors import FormatError, UserError
from hybridtrain.formats import hybrid
from hybridtrain.formats.families import FAMILIES, Family
from hybridtrain.formats.folder import need_transformers, new_folder
from hybridtrain.formats.ours import ROUTER_STATE, Source, biased, open_source, setting
from hybridtrain.formats.shards import write_safetensors
from hybridtrain.formats.tensors import DTYPES, cast, their_shape
from hybridtrain.settings import Settings, layer_specs, memory_layers
from hybridtrain.weights import COMPANIONS

AUTO = "auto"


def export_hf(path: Path, out: Path, *, family: str = AUTO, max_shard_bytes: int = 5 * 10**9, dtype: str = "float32") -> str:
    """Write the run folder or checkpoint `path` as the Hugging Face folder `out`; returns the family written.

    `family` is one of FAMILIES, "hybridtrain" (our own architecture with its modelling file), or "auto": the first that is
    the same model. One shard is in memory at a time. Raises FormatError listing why a family that was named is not.
    """
    if dtype not in DTYPES:
        raise UserError(f'--dtype "{dtype}": it may be {", ".join(DTYPES)}')
    source = open_source(path)
    run, info, settings, stored = source
    chosen = _choose(path, family, settings, biased(stored))
    transformers = need_transformers()
    ids = {"bos_token_id": info["separator_id"], "eos_token_id": info["separator_id"]}
    common = {"vocab_size": info["vocab_size"], "max_position_embeddings": settings.train.seq_len, "dtype": dtype, **ids}
    with new_folder(out) as made:
        if chosen == hybrid.NAME:
            tensors = hybrid.tensors(stored, info, settings, run)
            config = {**hybrid.config(settings, info), **common}
            shutil.copyfile(hybrid.MODELLING_FILE, made / hybrid.MODELLING_FILE.name)
        else:
            config = _config(transformers, FAMILIES[chosen], settings, common)
            tensors = _tensors(source, FAMILIES[chosen])
        (made / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_safetensors(made, {name: cast(tensor, DTYPES[dtype]) for name, tensor in tensors.items()}, max_shard_bytes)
        _write_companions(run, made, info["separator_id"], settings.train.seq_len, ids)
    return chosen


def _choose(path: Path, family: str, settings: Settings, biased: bool) -> str:
    names = (*FAMILIES, hybrid.NAME)
    if family not in (AUTO, *names):
        raise UserError(f'--family "{family}": it may be {AUTO}, {", ".join(names)}')
    if family == AUTO:
        return next((name for name, candidate in FAMILIES.items() if not misfits(candidate, settings, biased)), hybrid.NAME)
    if family != hybrid.NAME and (problems := misfits(FAMILIES[family], settings, biased)):
        raise FormatError(f"{path} is no {FAMILIES[family].architecture}", problems)
    return family


def misfits(family: Family, settings: Settings, biased: bool) -> list[str]:
    """Why a model of ours is none of the family; `biased`: some router's selection bias is not zero."""
    model, specs, name = settings.model, layer_specs(settings), family.architecture
    kinds = [spec.feedforward for spec in specs]
    out = []
    if layers := memory_layers(settings):
        out.append(f"layers {', '.join(map(str, layers))} have a lookup memory; {name} has none")
    for key, value in family.fixed.items():
        if (ours := setting(model, key)) != value and ("moe" in kinds or not key.startswith("moe.")):
            out.append(f"model.{key}={json.dumps(ours)}: {name} has {json.dumps(value)}")
    if family.arrange(kinds) is None:
        out.append(f"model.layers={json.dumps(model.layers)}: {name} has {family.pattern}")
    if model.dim % model.attention.num_heads and family.name == "llama":
        out.append(f"model.dim={model.dim} is no multiple of num_heads={model.attention.num_heads}, as {name} wants")
    if "moe" in kinds and "feedforward.router.bias_E" not in family.layer and biased:
        out.append(f"the routers have selection biases (model.moe.bias_rate); {name} has none")
    if "moe" in kinds and "feedforward.shared.w_up.weight" in family.layer:
        if model.moe.num_shared == 0:
            out.append(f"model.moe.num_shared=0: {name} has at least 1")
        if model.moe.num_experts < 2 * model.moe.num_groups:
            out.append(f"model.moe.num_groups={model.moe.num_groups}: {name} has at least 2 experts in a group")
    return out


def _config(transformers: Any, family: Family, settings: Settings, common: Mapping[str, Any]) -> dict[str, Any]:
    specs = layer_specs(settings)
    values = {key: setting(settings.model, ours) for key, ours in family.keys.items()}
    values |= {"num_hidden_layers": len(specs), "architectures": [family.architecture], "attention_bias": False}
    values |= {"rope_parameters": {"rope_type": "default", "rope_theta": settings.model.attention.rope_theta}}
    values |= family.arrange([spec.feedforward for spec in specs]) or {}
    values |= {**family.constants, **common}
    tree: dict[str, Any] = transformers.CONFIG_MAPPING[family.name](**values).to_dict()
    return tree | {"rope_theta": settings.model.attention.rope_theta}  # where transformers 4 looks for it


def _tensors(source: Source, family: Family) -> dict[str, LazyTensor]:
    """Their tensors, to be made of ours. Raises FormatError where one of ours would be left behind."""
    out, left = {}, []
    for name, shape in source.tensors():
        names = family.their_names(name, source.settings.model.moe.num_experts)
        if not names and not name.endswith(ROUTER_STATE):
            left.append(f"{name} has no place in {family.architecture}")
        for number, theirs in enumerate(names):
            out[theirs] = LazyTensor(their_shape(name, shape), torch.float32, partial(source.make, name, number))
    if left:
        raise FormatError(str(source.stored.path), left)
    return out


def _write_companions(run: Path, made: Path, separator_id: int, seq_len: int, ids: dict[str, int]) -> None:
    """The tokenizer and how it is used: as it was imported, or our separator at the beginning and end of a document."""
    shutil.copyfile(run / TOKENIZER, made / TOKENIZER)
    for name in COMPANIONS:
        if (run / name).is_file():
            shutil.copyfile(run / name, made / name)
    separator = load_tokenizer(run / TOKENIZER).id_to_token(separator_id)
    defaults: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": separator,
            "eos_token": separator,
            "model_max_length": seq_len,
            "clean_up_tokenization_spaces": False,
        },
        "generation_config.json": ids,
    }
    for name, tree in defaults.items():
        if not (made / name).exists():
            (made / name).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
