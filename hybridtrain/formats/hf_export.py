"""From a checkpoint of ours to a Hugging Face folder: as a published architecture where one is the same
model, else as our own.
"""

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
from hybridtrain.formats import hf_hybrid
from hybridtrain.formats.families import FAMILIES, Family
from hybridtrain.formats.folder import need_transformers, new_folder
from hybridtrain.formats.hf_config import (
    CONFIG,
    DTYPE_KEYS,
    GENERATION,
    TOKEN_IDS,
    Config,
    problems_of,
    resolve,
)
from hybridtrain.formats.native import (
    AS_IMPORTED,
    ROUTER_STATE,
    Source,
    biased,
    open_source,
    output_dtype,
    setting,
    unnamed,
)
from hybridtrain.formats.origin import Origin, read_origin
from hybridtrain.formats.shards import write_safetensors
from hybridtrain.formats.tensors import DTYPES, cast, their_shape
from hybridtrain.run.init_from import ORIGIN, copy_companions
from hybridtrain.settings.layers import engram_layers, layer_specs
from hybridtrain.settings.tree import Settings

AUTO = "auto"


def export_hf(
    path: Path, out: Path, *, family: str = AUTO, max_shard_bytes: int = 5 * 10**9, dtype: str = AS_IMPORTED
) -> str:
    """Write the run folder or checkpoint `path` as the Hugging Face folder `out`; returns the family written.

    `family` is one of FAMILIES, "hybridtrain" (our own architecture with its modelling file), or "auto": the
    first that is the same model, that of an import before others. `dtype` is of the matrices: one of DTYPES,
    or that of the import. One shard is in memory at a time. Raises FormatError listing why a family that was
    named is not, and where a tensor has values beyond the dtype.
    """
    source = open_source(path)
    run, info, settings, stored = source
    if problems := unnamed(settings, "hf"):
        raise FormatError(str(path), problems)
    origin = read_origin(run)
    dtype = output_dtype(dtype, origin)
    chosen = _choose(path, family, settings, biased(stored), origin)
    need_transformers()
    described = {
        "vocab_size": info["vocab_size"],
        "max_position_embeddings": origin.longest(settings.train.seq_len),
        "dtype": dtype,
        **origin.token_ids(run, info["separator_id"]),
    }
    with new_folder(out) as made:
        if chosen == hf_hybrid.NAME:
            tensors = hf_hybrid.tensors(stored, info, settings, run)
            config = {**hf_hybrid.config(settings, info), **described}
            shutil.copyfile(hf_hybrid.MODELLING_FILE, made / hf_hybrid.MODELLING_FILE.name)
        else:
            config = _config(FAMILIES[chosen], settings, described, origin, run / ORIGIN)
            tensors = _tensors(source, FAMILIES[chosen])
        (made / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_safetensors(
            made, {name: cast(tensor, DTYPES[dtype]) for name, tensor in tensors.items()}, max_shard_bytes
        )
        copy_companions(run, made, TOKENIZER)
        if (origin.config or {}).get("model_type") != chosen:
            _write_usage(made, info["separator_id"], described)
    return chosen


def _choose(path: Path, family: str, settings: Settings, biased: bool, origin: Origin) -> str:
    names = (*FAMILIES, hf_hybrid.NAME)
    if family not in (AUTO, *names):
        raise UserError(f'--family "{family}": it may be {AUTO}, {", ".join(names)}')
    if family == AUTO:
        came = (origin.config or {}).get("model_type")
        candidates = sorted(FAMILIES, key=lambda name: name != came)  # that of an import first
        return next(
            (name for name in candidates if not misfits(FAMILIES[name], settings, biased)), hf_hybrid.NAME
        )
    if family != hf_hybrid.NAME and (problems := misfits(FAMILIES[family], settings, biased)):
        raise FormatError(f"{path} is not a {FAMILIES[family].architecture}", problems)
    return family


def misfits(family: Family, settings: Settings, biased: bool) -> list[str]:
    """Why a model of ours is not one of the family; `biased`: some router's selection bias is not zero."""
    model, specs, name = settings.model, layer_specs(settings), family.architecture
    kinds = [spec.feedforward for spec in specs]
    out = []
    if layers := engram_layers(settings):
        out.append(f"layers {', '.join(map(str, layers))} are Engram layers; {name} has none")
    for key, value in family.fixed.items():
        if (ours := setting(model, key)) != value and ("moe" in kinds or not key.startswith("moe.")):
            out.append(f"model.{key}={json.dumps(ours)}: {name} has {json.dumps(value)}")
    if family.arrange(kinds) is None:
        out.append(f"model.layers={json.dumps(model.layers)}: {name} has {family.pattern}")
    if model.dim % model.attention.num_heads and family.name == "llama":
        out.append(
            f"model.dim={model.dim} is not a multiple of num_heads={model.attention.num_heads}, as {name} "
            "wants"
        )
    if "moe" in kinds and "feedforward.router.bias_E" not in family.layer and biased:
        out.append(f"the routers have selection biases (model.moe.bias_rate); {name} has none")
    if "moe" in kinds and "feedforward.shared.w_up.weight" in family.layer:
        if model.moe.num_shared == 0:
            out.append(f"model.moe.num_shared=0: {name} has at least 1")
        if model.moe.num_experts < 2 * model.moe.num_groups:
            out.append(
                f"model.moe.num_groups={model.moe.num_groups}: {name} has at least 2 experts in a group"
            )
    return out


def _config(
    family: Family, settings: Settings, described: Mapping[str, Any], origin: Origin, file: Path
) -> dict[str, Any]:
    """config.json: that of the import with what is now another value, or a new one with transformers'
    defaults.

    Raises FormatError where `origin`, that of `file`, has what an import would have refused: whoever made the
    run folder wrote it.
    """
    if origin.config is not None and origin.config.get("model_type") == family.name:
        came = resolve(origin.config, file)
        if problems := problems_of(came):
            raise FormatError(str(file), problems)
        return _changed(came, settings, described, retyped=described["dtype"] != origin.dtype)
    kinds = [spec.feedforward for spec in layer_specs(settings)]
    values = {key: setting(settings.model, ours) for key, ours in family.keys.items()}
    values |= {
        "num_hidden_layers": len(kinds),
        "architectures": [family.architecture],
        "attention_bias": False,
    }
    values |= {"rope_parameters": {"rope_type": "default", "rope_theta": settings.model.attention.rope_theta}}
    values |= {**(family.arrange(kinds) or {}), **family.constants, **described}
    tree: dict[str, Any] = need_transformers().CONFIG_MAPPING[family.name](**values).to_dict()
    return tree | {"rope_theta": settings.model.attention.rope_theta}  # where transformers 4 looks for it


def _changed(came: Config, settings: Settings, described: Mapping[str, Any], retyped: bool) -> dict[str, Any]:
    """The keys of the import in their own spelling, without those whose value is no longer the model's.

    `retyped`: the weights have another dtype than those that came.
    """
    family, kinds, theta = (
        came.family,
        [spec.feedforward for spec in layer_specs(settings)],
        settings.model.attention.rope_theta,
    )
    now = {key: setting(settings.model, ours) for key, ours in family.keys.items()} | {
        "num_hidden_layers": len(kinds)
    }
    now |= {key: value for key, value in described.items() if key != "dtype"}
    changed = {key: value for key, value in now.items() if came.get(key) != value}
    if came.kinds != kinds:
        changed |= {**family.constants, **(family.arrange(kinds) or {})}
    gone = {
        key for pair in type(came.values).attribute_map.items() for key in pair if changed.keys() & set(pair)
    }
    if came.rotations.rope_theta != theta:
        changed |= {"rope_parameters": {"rope_type": "default", "rope_theta": theta}, "rope_theta": theta}
        gone.add("rope_scaling")
    if "num_hidden_layers" in changed:
        gone.add("layer_types")  # all alike, and as many as there were layers
    changed |= {key: described["dtype"] for key in DTYPE_KEYS if retyped and came.tree.get(key) is not None}
    return {key: value for key, value in came.tree.items() if key not in gone} | changed


def _tensors(source: Source, family: Family) -> dict[str, LazyTensor]:
    """Their tensors, to be made of ours. Raises FormatError where one of ours would be left behind."""
    out, left = {}, []
    for name, shape in source.tensors():
        names = family.their_names(name, source.settings.model.moe.num_experts)
        if not names and not name.endswith(ROUTER_STATE):
            left.append(f"{name} has no place in {family.architecture}")
        for number, theirs in enumerate(names):
            out[theirs] = LazyTensor(
                their_shape(name, shape), torch.float32, partial(source.make, name, number)
            )
    if left:
        raise FormatError(str(source.stored.path), left)
    return out


def _write_usage(made: Path, separator_id: int, described: Mapping[str, Any]) -> None:
    """Write how the tokenizer is used, where no imported file says so: our separator begins and ends a
    document.
    """
    separator = load_tokenizer(made / TOKENIZER).id_to_token(separator_id)
    defaults: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": separator,
            "eos_token": separator,
            "model_max_length": described["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        },
        GENERATION: {key: described[key] for key in TOKEN_IDS if key in described},
    }
    for name, tree in defaults.items():
        if not (made / name).exists():
            (made / name).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
